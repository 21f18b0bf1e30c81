"""A request is trained on and scored as served, in however many chunks it arrived and samples it is cut into."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from data_loader_world import MemoryLog, World, as_json, names, requests
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import LINE, TARGET, WIDTH, conversation, record_of, tables_of
from torch import Tensor

from schemas.settings import Train
from schemas.speculator.draft_context import LOOKAHEAD_TOKENS, count_skipped
from schemas.speculator.network import DraftShape, EagleDraft, Projected, random_draft
from schemas.trace.record import VerifyStep
from trainer.data.batch import collate
from trainer.data.samples import Sample, Teacher, join_samples, split_sample
from trainer.data.table_reader import VERSIONS_PER_READ, TableReader
from trainer.objective.losses import ttt_loss
from trainer.objective.simulated_acceptance import SimulatedAcceptance, simulate_acceptance
from trainer.replay.experiment import TableSpan, read_samples

VOCABULARY, PROMPT, TOKENS = 24, 6, 61
SHAPE = DraftShape(8, 12, 4, 2, 4, VOCABULARY, VOCABULARY, 1e-6, 100.0, 64, (1, 2, 3))
EMBEDDINGS = torch.randn(VOCABULARY, 8, generator=torch.Generator().manual_seed(9))
TRAIN = Train(ttt_steps=3, rejected_weight=0.5, rejected_min_prob=0.0)
ANSWERED = conversation([(7 * i + i * i // 5) % 19 for i in range(TOKENS)], PROMPT)


def tiny_draft() -> EagleDraft:
    draft = random_draft(SHAPE, seed=1)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return draft


def commit(log: MemoryLog, request: str, chunks: Sequence[Sequence[VerifyStep]], *, ends: bool = True) -> None:
    """Commit the chunks of a request, each in its own commit."""
    for number, steps in enumerate(chunks):
        last = ends and number == len(chunks) - 1
        rows = tables_of(record_of(request, steps, log.version("accepted"), chunk=number, last=last))
        for name in ("rejected", "accepted"):
            log.append(name, rows[name])


def chunked(cuts: Sequence[int], steps: Sequence[VerifyStep] = ANSWERED) -> list[Sequence[VerifyStep]]:
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(steps)}), len(steps)]
    return [steps[begin:end] for begin, end in itertools.pairwise(edges)]


def read(log: MemoryLog, **limits: object) -> list[Sample]:
    reader = TableReader(log, TARGET, LINE, TRAIN.model_copy(update=limits), Counter())  # type: ignore[arg-type]
    return [entry.sample for entry in reader.read(log.version("accepted"), log.version("rejected"))]


def samples_of(cuts: Sequence[int], **limits: object) -> list[Sample]:
    log = MemoryLog()
    commit(log, "r", chunked(cuts))
    return read(log, **limits)


def fail(_tokens: Tensor) -> Tensor:
    raise AssertionError("the features are there")


def learn(samples: Sequence[Sample], lookahead: int = 4) -> tuple[float, list[Tensor], SimulatedAcceptance]:
    """Return loss, gradients and acceptance of a draft on samples."""
    draft = tiny_draft()
    loss = ttt_loss(draft, EMBEDDINGS, collate(samples), TRAIN)
    loss.total.backward()
    gradients = [parameter.grad for parameter in draft.parameters() if parameter.grad is not None]
    return float(loss.total.detach()), gradients, simulate_acceptance(draft, EMBEDDINGS, samples, lookahead)


def assert_equal(found: Sequence[Sample], wanted: Sequence[Sample], lookahead: int = 4) -> None:
    loss, gradients, score = learn(found, lookahead)
    wanted_loss, wanted_gradients, wanted_score = learn(wanted, lookahead)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert score == wanted_score
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-6)


def test_a_request_in_three_chunks_is_trained_and_scored_as_in_one() -> None:
    (whole,) = samples_of([])
    found = samples_of([5, 17])
    assert learn([whole])[2].verify_steps > 20
    assert len(whole.branches) == len(ANSWERED) - 1
    assert_equal(found, [whole])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, len(ANSWERED) - 1), max_size=8), st.integers(1, 40), st.sampled_from([1, 4, 16]))
def test_neither_chunks_nor_cuts_change_loss_gradient_or_score(
    cuts: list[int], max_tokens: int, lookahead: int
) -> None:
    assert_equal(samples_of(cuts, max_sample_tokens=max_tokens), samples_of([]), lookahead)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 50))
def test_every_row_belongs_to_one_sample_with_at_most_the_context_before_it(max_tokens: int, context: int) -> None:
    parts = samples_of([9], max_sample_tokens=max_tokens, context_tokens=context)
    owned = [part.position + row for part in parts for row in part.own_rows]
    # The last row has no teacher behind it; whether a part would consist of it alone depends on the cut.
    assert [row for row in owned if row < TOKENS - 3] == list(range(TOKENS - 3))
    assert max(part.own_begin for part in parts) <= context
    assert all(part.own_rows.stop - part.own_begin <= max_tokens for part in parts)
    again = [piece for part in parts for piece in split_sample(part, max_tokens, context)]
    assert [(p.position, p.own_rows, len(p)) for p in again] == [(p.position, p.own_rows, len(p)) for p in parts]
    assert sum(len(part.branches) for part in parts) == len(ANSWERED) - 1


@given(prompt=st.integers(1, 3000), context=st.integers(0, 1200))
def test_a_node_skips_the_tokens_that_the_first_sample_of_a_request_does_not_hold(prompt: int, context: int) -> None:
    tokens = torch.zeros(prompt + 3, dtype=torch.int64)
    known = torch.arange(prompt + 3) >= prompt - 1
    teacher = Teacher(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1))
    first, *_ = split_sample(Sample("r", tokens, None, torch.zeros(prompt + 3, 0), known, teacher), 512, context)
    assert count_skipped(prompt, context) == first.position


def test_a_long_request_is_trained_at_the_positions_at_which_it_was_served(monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog()
    steps = conversation([(5 * i + i * i // 7) % 19 for i in range(4001)], 3900)
    commit(log, "r", chunked([10, 30], steps))
    (sample,) = read(log)
    assert (sample.position + len(sample), sample.own_rows.stop) == (3999 + 1, len(sample))
    positions: list[Tensor] = []
    project = EagleDraft.project

    def recording(self: EagleDraft, embeddings: Tensor, hidden: Tensor, positions_BT: Tensor) -> Projected:
        positions.append(positions_BT)
        return project(self, embeddings, hidden, positions_BT)

    monkeypatch.setattr(EagleDraft, "project", recording)
    ttt_loss(tiny_draft(), EMBEDDINGS, collate([sample]), TRAIN)
    assert int(positions[0].max()) == 3999
    assert int(positions[0].min()) == 3899 - LOOKAHEAD_TOKENS - 1024
    assert int(positions[2].max()) >= 3999


def test_chunks_behind_a_missing_one_keep_their_positions() -> None:
    log = MemoryLog()
    first, _, third = chunked([5, 17])
    commit(log, "r", [first, third])
    begin, rest = read(log)
    assert (begin.position, len(begin)) == (0, PROMPT + 8)
    assert rest.position == third[0].position
    with pytest.raises(ValueError, match="a chunk starts at"):
        join_samples([begin, rest])


def test_a_request_without_its_last_chunk_is_returned_late_and_not_never() -> None:
    log, counts, now = MemoryLog(), Counter[str](), [0.0]
    reader = TableReader(log, TARGET, LINE, TRAIN, counts, lambda: now[0])  # type: ignore[arg-type]
    commit(log, "r", chunked([5]), ends=False)
    assert reader.read(2, 2) == []
    now[0] = 119.0
    assert reader.take_overdue() == []
    now[0] = 120.0
    (entry,) = reader.take_overdue()
    assert len(entry.sample) == TOKENS - 1
    assert counts["requests_joined_early"] == 1
    assert reader.open_requests == ()


def test_a_replay_joins_chunks_however_long_it_trains_between_them() -> None:
    log, cuts = MemoryLog(), list(range(TOKENS))
    commit(log, "r", chunked(cuts))
    assert log.version("accepted") > VERSIONS_PER_READ
    span = TableSpan(
        accepted=(0, log.version("accepted")), rejected=(0, log.version("rejected")), target=TARGET, line=LINE
    )
    settings = TRAIN.model_copy(update={"join_timeout": 1e-9})
    assert_equal(list(read_samples(log, span, settings, fail, Counter())), samples_of([]))  # type: ignore[arg-type]


def test_the_oldest_open_requests_are_returned_where_all_exceed_their_bytes() -> None:
    log, size = MemoryLog(), 2 * WIDTH * (TOKENS - 1)
    limits = TRAIN.model_copy(update={"join_bytes": 2 * size})
    reader = TableReader(log, TARGET, LINE, limits, Counter())  # type: ignore[arg-type]
    for request in ("a", "b", "c"):
        commit(log, request, [ANSWERED], ends=False)
    assert reader.read(3, 3) == []
    assert [entry.sample.request for entry in reader.take_overdue()] == ["a"]


@pytest.mark.parametrize("seed", range(4))
def test_a_restored_data_loader_returns_every_chunk_once_and_joined_as_before(seed: int) -> None:
    generator, log = random.Random(seed), MemoryLog()
    left = {name: [(i, c) for i, c in enumerate(chunked([4, 9, 20]))] for name in requests(6)}
    while waiting := [name for name in left if left[name]]:
        name = generator.choice(waiting)
        number, steps = left[name].pop(0)
        rows = tables_of(record_of(name, steps, log.version("accepted"), chunk=number, last=not left[name]))
        for table in ("rejected", "accepted"):
            log.append(table, rows[table])
    world = World(log)
    limits: dict[str, object] = {"batch_size": 1, "replay_batch_size": 0, "max_epochs": 1, "max_sample_tokens": 30}
    plain, restored = world.data_loader(**limits), world.data_loader(**limits)
    steps_taken: list[list[tuple[str, int, int]]] = [[], []]
    for _ in range(40):
        for loader, taken in zip((plain, restored), steps_taken, strict=True):
            loader.poll()
            taken += [(s.request, s.position + s.own_begin, len(s.branches)) for s in loader.next_samples()]
        after, restored = restored, world.data_loader(**limits)
        restored.restore(as_json(after))
    assert steps_taken[0] == steps_taken[1]
    assert Counter(name for name, _, _ in steps_taken[0]) == dict.fromkeys(requests(6), 2)
    assert names(restored.held_out) == []


def test_chunks_that_have_to_be_recomputed_are_joined_without_their_repeated_tokens() -> None:
    first, second = chunked([9])
    before = [token for step in first for token in step.tokens]
    log = MemoryLog()
    for number, (steps, known) in enumerate(((first, []), (second, before))):
        record = record_of("r", steps, number, chunk=number, last=bool(number), features="recompute", before=known)
        rows = tables_of(record)
        for name in ("rejected", "accepted"):
            log.append(name, rows[name])
    (joined,), (whole,) = read(log), samples_of([])
    assert not joined.has_features
    assert torch.equal(joined.tokens, whole.tokens)
    assert torch.equal(joined.known, whole.known)
    assert torch.equal(joined.teacher.ids, whole.teacher.ids)
    assert [b.root for b in joined.branches] == [b.root for b in whole.branches]
    assert replace(joined, features=whole.features).has_features
