"""Verify steps, acceptance probabilities and figures of replay, against slow and plain code."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from schemas.speculator.acceptance import sampling_probs
from schemas.speculator.draft_context import count_skipped
from schemas.speculator.network import DraftShape, random_draft
from trainer.data.batch import collate
from trainer.data.samples import RequestSampling, Sample, Teacher
from trainer.objective.simulated_acceptance import simulate_acceptance
from trainer.replay.acceptance_figures import compare_steps, compute_figures
from trainer.replay.chains import acceptance_probabilities
from trainer.replay.past_requests import PastRequest, RequestService
from trainer.replay.prequential import simulate_positions
from trainer.replay.request_evaluation import merge_acceptance
from trainer.replay.verify_steps import ExpectedSteps, expect_steps

VOCABULARY, LONGEST = 30, 3
GREEDY = RequestSampling(0.0, 1.0, 0)
SERVICE = RequestService("node", datetime.fromtimestamp(1, UTC), datetime.fromtimestamp(2, UTC))
SHAPE = DraftShape(8, 8, 2, 1, 4, VOCABULARY, 20, 1e-5, 10_000.0, 64, (0, 1, 2), "eagle3.1")


def walked(right: np.ndarray) -> tuple[int, int]:
    """Count verify steps and accepted tokens for fixed right and wrong tokens, one step after the other."""
    positions, longest = right.shape
    root = verify_steps = kept = 0
    while root < positions:
        most, length = min(longest, positions - 1 - root), 0
        while length < most and right[root, length]:
            length += 1
        root, verify_steps, kept = root + length + 1, verify_steps + 1, kept + length
    return verify_steps, kept


rights = st.tuples(st.integers(1, 12), st.integers(1, 4)).flatmap(lambda shape: of_numpy.arrays(np.bool_, shape))


@given(rights)
def test_verify_steps_of_a_greedy_request_equal_a_walk(right: np.ndarray) -> None:
    found = expect_steps(right.astype(np.float64))
    assert (found.verify_steps, found.accepted) == walked(right)
    assert found.verify_steps + found.accepted == len(right), (
        "each verify step gives its accepted tokens and the bonus token"
    )
    assert sum(found.accepted_K) == found.accepted


@given(st.integers(1, 12), st.data())
def test_a_merged_greedy_draft_reaches_as_deep_as_the_deeper_of_both(positions: int, data: st.DataObject) -> None:
    first, second = (
        data.draw(of_numpy.arrays(np.bool_, st.tuples(st.just(positions), st.integers(1, 5)))) for _ in range(2)
    )
    longest = max(first.shape[1], second.shape[1])
    reach = np.zeros((2, positions, longest), np.bool_)
    for part, right in zip(reach, (first, second), strict=True):
        part[:, : right.shape[1]] = np.logical_and.accumulate(right, axis=1)
    found = expect_steps(merge_acceptance([first.astype(np.float64), second.astype(np.float64)]))
    assert (found.verify_steps, found.accepted) == walked(reach.any(axis=0))


def test_a_merged_sampled_draft_is_the_mean_over_the_outcomes_of_the_versions_draft() -> None:
    generator = np.random.default_rng(0)
    chance, suffix = generator.random((7, 3)), np.logical_and.accumulate(generator.random((7, 4)) < 0.6, axis=1)
    seen = []
    for _ in range(20_000):
        own = np.pad(np.logical_and.accumulate(generator.random((7, 3)) < chance, axis=1), ((0, 0), (0, 1)))
        seen.append(walked(own | suffix))
    found = expect_steps(merge_acceptance([chance, suffix.astype(np.float64)]))
    assert np.allclose((found.verify_steps, found.accepted), np.mean(seen, axis=0), atol=0.05)


def test_one_draft_alone_is_merged_to_itself() -> None:
    chance = np.random.default_rng(0).random((7, 3))
    assert np.allclose(merge_acceptance([chance]), chance)


def test_verify_steps_of_a_sampled_request_are_the_mean_over_all_outcomes() -> None:
    generator = np.random.default_rng(0)
    chance = generator.random((7, 3))
    seen = np.mean([walked(generator.random((7, 3)) < chance) for _ in range(20_000)], axis=0)
    found = expect_steps(chance)
    assert np.allclose((found.verify_steps, found.accepted), seen, atol=0.05)
    assert found.verify_steps + found.accepted == pytest.approx(7)


def past(sampling: RequestSampling = GREEDY, *, tokens: int = 14) -> tuple[PastRequest, torch.Tensor]:
    """Return a synthetic request, and the target's full distributions over its answer."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    logprobs = torch.log_softmax(2 * torch.randn(tokens - 4, VOCABULARY, generator=generator), dim=-1)
    best = logprobs.topk(VOCABULARY, dim=-1)
    features = torch.randn(tokens - 1, SHAPE.feature_width, generator=generator).bfloat16()
    return PastRequest("r", None, sampling, SERVICE, ids, features, 4, Teacher(best.indices, best.values)), logprobs


EMBEDDINGS = torch.randn(VOCABULARY, 8, generator=torch.Generator().manual_seed(3))


def test_greedy_replay_equals_the_score_of_the_gate_and_over_all_positions_that_of_learning_curves() -> None:
    one, _ = past(tokens=40)
    one.tokens_N.copy_(one.tokens_N % 4)
    draft = random_draft(SHAPE, 4)
    with torch.no_grad():
        draft.lm_head.weight[4:] = 0
    known = torch.arange(39) >= 3
    sample = Sample("r", one.tokens_N[:-1], int(one.tokens_N[-1]), one.features_NF, known, one.teacher)
    expected = simulate_acceptance(draft, EMBEDDINGS, [sample], LONGEST)
    found = expect_steps(acceptance_probabilities(draft, EMBEDDINGS, one, LONGEST))
    assert (found.accepted, found.verify_steps) == expected
    assert 0 < expected.tokens < LONGEST * expected.verify_steps
    answer = replace(sample, known=torch.arange(39) >= 4, teacher=one.teacher[1:])
    positions = simulate_positions(draft, EMBEDDINGS, collate([answer]), LONGEST)
    assert (found.all_positions_accepted, found.all_positions) == positions


def test_a_replayed_draft_reads_as_much_of_a_prompt_as_a_node() -> None:
    one, _ = past(RequestSampling(0.9, 0.95, 0), tokens=60)
    long, near = replace(one, prompt=40, teacher=one.teacher[36:]), count_skipped(40, 12)
    tail = replace(long, tokens_N=one.tokens_N[near:], features_NF=one.features_NF[near:], prompt=40 - near)
    draft = random_draft(SHAPE, 4)
    whole, found, limited, unlimited = (
        acceptance_probabilities(draft, EMBEDDINGS, request, LONGEST, context)
        for request, context in ((long, None), (tail, None), (long, 12), (long, 40))
    )
    assert (limited == found).all()
    assert (limited != whole).any()
    assert (unlimited == whole).all()


def test_a_sampled_token_is_accepted_with_the_probability_that_the_draft_proposed_it() -> None:
    sampling = RequestSampling(0.9, 0.95, 0)
    one, logprobs = past(sampling)
    draft = random_draft(SHAPE, 4)
    p = sampling_probs(logprobs, 0.9, 0.95)
    answers = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    one.tokens_N[4:] = answers
    found = acceptance_probabilities(draft, EMBEDDINGS, one, 1)[:, 0]
    greedy = acceptance_probabilities(draft, EMBEDDINGS, PastRequest(**{**_fields(one), "sampling": GREEDY}), 1)[:, 0]
    assert set(greedy) <= {0.0, 1.0}
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[answers[1:].numpy() >= 20] == 0).all(), "outside the draft vocabulary"
    assert found.max() > 0.02


def _fields(one: PastRequest) -> dict[str, object]:
    return {name: getattr(one, name) for name in PastRequest.__dataclass_fields__}


def verify_steps_of(accepted: float, verify_steps: float) -> ExpectedSteps:
    return ExpectedSteps(verify_steps, accepted, (verify_steps,), (accepted,), accepted, int(verify_steps))


def test_intervals_contain_the_figure_and_a_paired_difference_is_narrower() -> None:
    generator = np.random.default_rng(0)
    base = [verify_steps_of(float(generator.integers(0, 60)), 20) for _ in range(50)]
    better = [verify_steps_of(one.accepted + 2, 20) for one in base]
    one, paired = (
        compute_figures(base).accepted_per_step,
        compare_steps(better, base),
    )
    assert one.low < one.value < one.high
    assert paired.value == pytest.approx(0.1)
    assert paired.high - paired.low < 1e-9 < one.high - one.low
    assert paired.is_clear
    assert not compare_steps(base, base).is_clear
    assert compute_figures(base) == compute_figures(base), "the same resamples every time"


def test_acceptance_by_depth_counts_only_possible_drafts() -> None:
    found = compute_figures([expect_steps(np.ones((5, 4)))])
    assert found.by_depth == (1.0, 1.0, 1.0, 1.0)
    assert (found.verify_steps, found.accepted) == (1, 4)
    short = expect_steps(np.ones((2, 4)))
    assert Counter(short.possible_K) == {1.0: 1, 0.0: 3}
