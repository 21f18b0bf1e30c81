"""The training lineage of a version, as spans."""

from __future__ import annotations

from schemas.telemetry.spans import MAX_LINKS
from schemas.telemetry.trace_context import new_trace, request_context, version_context
from trainer.release.registration import TrainingLineage


def test_a_version_names_all_requests_it_was_trained_on_in_spans_with_at_most_the_maximum_of_links() -> None:
    lineage, contexts = TrainingLineage(), [new_trace() for _ in range(MAX_LINKS + 1)]
    for step, context in enumerate(contexts, start=1):
        lineage.add(step, [context.to_request_id("cmpl")] * 2)
    whole, *parts = lineage.close_version("line", "7", 200)
    assert (whole.context, whole.attributes["requests"]) == (version_context("line", "7"), len(contexts))
    assert [len(part.links) for part in parts] == [MAX_LINKS, 1]
    assert {link.trace_id for part in parts for link in part.links} == {context.trace_id for context in contexts}
    assert all(
        part.context.trace_id == whole.context.trace_id and part.parent == whole.context.span_id for part in parts
    )
    assert [span.attributes["requests"] for span in lineage.close_version("line", "8", 201)] == [0]


def test_requests_of_rolled_back_steps_are_not_in_the_lineage() -> None:
    lineage = TrainingLineage()
    lineage.add(1, ["a"])
    lineage.add(2, ["a", "b"])
    lineage.roll_back(1)
    whole, part = lineage.close_version("line", "7", 3)
    assert whole.attributes["requests"] == 1
    assert part.links == (request_context("a"),)
