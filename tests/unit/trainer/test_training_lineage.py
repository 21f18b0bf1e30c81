"""The training lineage of a version, as spans."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from schemas.telemetry.spans import MAX_LINKS, Span
from schemas.telemetry.trace_context import new_trace, request_context, version_context
from trainer.release import registration
from trainer.release.registration import TrainingLineage, trained_on_spans


def lineage_of(parent: str = "day-0") -> TrainingLineage:
    lineage = TrainingLineage()
    lineage.start(parent)
    return lineage


def register(lineage: TrainingLineage, version: str, step: int) -> list[Span]:
    record = lineage.read(lineage.mark(step))
    lineage.register(version, record)
    return list(trained_on_spans("line", version, record, record.until))


def test_a_version_names_all_requests_it_was_trained_on_in_spans_with_at_most_the_maximum_of_links() -> None:
    lineage, contexts = lineage_of(), [new_trace() for _ in range(MAX_LINKS + 1)]
    for step, context in enumerate(contexts, start=1):
        lineage.add(step, [context.to_request_id("cmpl")] * 2)
    whole, *parts = register(lineage, "7", 200)
    assert (whole.context, whole.attributes["requests"]) == (version_context("line", "7"), len(contexts))
    assert [len(part.links) for part in parts] == [MAX_LINKS, 1]
    assert {link.trace_id for part in parts for link in part.links} == {context.trace_id for context in contexts}
    assert all(
        part.context.trace_id == whole.context.trace_id and part.parent == whole.context.span_id for part in parts
    )
    assert [span.attributes["requests"] for span in register(lineage, "8", 201)] == [0]


def test_requests_of_rolled_back_steps_are_not_in_the_lineage() -> None:
    lineage = lineage_of()
    lineage.add(1, ["a"])
    lineage.add(2, ["a", "b"])
    lineage.roll_back(1, "day-0")
    whole, part = register(lineage, "7", 3)
    assert whole.attributes["requests"] == 1
    assert part.links == (request_context("a"),)


def test_weights_after_a_rollback_are_of_another_course() -> None:
    lineage = lineage_of()
    before = lineage.id
    assert before != lineage_of().id
    lineage.mark(2)
    assert lineage.id == before
    lineage.roll_back(1, "day-0")
    assert lineage.id != before


def test_what_training_sees_while_a_version_is_registered_counts_for_the_next_one() -> None:
    lineage = lineage_of()
    lineage.add(1, ["a", "replayed"])
    first = lineage.read(lineage.mark(1))
    lineage.add(2, ["replayed", "b"])
    second = lineage.mark(2)
    lineage.register("7", first)
    assert set(first.requests) == {"a", "replayed"}
    record = lineage.read(second)
    assert (record.parent, set(record.requests)) == ("7", {"replayed", "b"})
    assert record.since == first.until


def test_a_version_of_weights_that_training_was_rolled_back_behind_is_no_parent() -> None:
    lineage = lineage_of()
    lineage.add(1, ["a"])
    lineage.add(2, ["b"])
    record = lineage.read(lineage.mark(2))
    lineage.roll_back(1, "day-0")
    lineage.add(2, ["c"])
    lineage.register("7", record)
    after = lineage.read(lineage.mark(2))
    assert set(record.requests) == {"a", "b"}
    assert (after.parent, set(after.requests)) == ("day-0", {"a", "c"})


def test_requests_beyond_the_maximum_are_counted() -> None:
    lineage = lineage_of()
    lineage.add(1, [str(i) for i in range(registration.MAX_TRACKED_REQUESTS + 3)])
    record = lineage.read(lineage.mark(1))
    assert (len(record.requests), record.untracked) == (registration.MAX_TRACKED_REQUESTS, 3)


class SlowLineage:
    """Remembers every step of the weights in training, and all versions and marks on them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []
        self.marks: dict[int, tuple[int, int]] = {}
        self.versions: list[tuple[int, int, str]] = [(0, 0, "day-0")]

    def roll_back(self, step: int) -> None:
        self.seen = [(at, request) for at, request in self.seen if at <= step]
        self.marks = {mark: (at, length) for mark, (at, length) in self.marks.items() if at <= step}
        self.versions = [one for one in self.versions if one[0] <= step]

    def read(self, mark: int) -> tuple[str, set[str]]:
        _, begin, parent = self.versions[-1]
        return parent, {request for _, request in self.seen[begin : self.marks[mark][1]]}


ACTIONS = st.one_of(
    st.tuples(st.just("train"), st.integers(0, 5)),
    st.tuples(st.just("mark"), st.just(0)),
    st.tuples(st.sampled_from(["register", "keep"]), st.integers(0, 2)),
    st.tuples(st.just("roll back"), st.integers(0, 4)),
)


@given(st.lists(ACTIONS, max_size=40))
def test_the_lineage_equals_that_of_a_complete_history(actions: list[tuple[str, int]]) -> None:
    lineage, slow, step, versions = lineage_of(), SlowLineage(), 0, 0
    for action, value in actions:
        if action == "train":
            step += 1
            lineage.add(step, [str(value)])
            slow.seen.append((step, str(value)))
        elif action == "mark":
            slow.marks[lineage.mark(step)] = (step, len(slow.seen))
        elif action == "roll back" and value < step:
            step -= value
            slow.roll_back(step)
            lineage.roll_back(step, "day-0")
        elif action in ("register", "keep") and (open_ := sorted(slow.marks)):
            mark = open_[min(value, len(open_) - 1)]
            record = lineage.read(mark)
            assert (record.parent, set(record.requests)) == slow.read(mark)
            at, length = slow.marks.pop(mark)
            if action == "keep" or versions == registration.MAX_VERSIONS - 1:
                lineage.keep(mark)
                continue
            versions += 1
            lineage.register(str(versions), record)
            slow.versions.append((at, length, str(versions)))
            # Registrations end in the order of their marks: an older mark was replaced.
            for older in [one for one in slow.marks if one < mark]:
                lineage.keep(older)
                del slow.marks[older]
        assert all(lineage.has(mark) for mark in slow.marks)
        assert lineage.parent == slow.versions[-1][2]
