"""The acceptance of sampled draft tokens against exact enumeration, and the scores of held-out samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import conversation, record_of, tables_of
from torch import Tensor

from schemas.speculator.acceptance import sampling_probs
from schemas.speculator.network import DraftShape, EagleDraft, random_draft
from trainer.data.samples import RequestSampling, Sample, Teacher, join_samples, read_sample, split_sample
from trainer.objective.sampled_acceptance import (
    apply_sampling,
    coupled_acceptance,
    read_choice_probs,
    rejection_acceptance,
)
from trainer.objective.simulated_acceptance import simulate_acceptance, simulate_each

PLAIN = RequestSampling(1.0, 1.0, 0)
TARGET = (0.5, 0.3, 0.2)
PEAKED = (0.98, 0.01, 0.01)


def distributions(size: int) -> st.SearchStrategy[Tensor]:
    weights = st.lists(st.floats(0.01, 1), min_size=size, max_size=size)
    return weights.map(lambda w: torch.tensor(w, dtype=torch.float64) / sum(w))


def constant_draft(q: Sequence[float], vocabulary: int | None = None) -> EagleDraft:
    """Return a draft of the first tokens that always gives them the same probabilities."""
    draft = random_draft(DraftShape(8, 8, 2, 1, 4, vocabulary or len(q), len(q), 1e-5, 1e4, 64, (0, 1, 2)), 0)
    logits = torch.tensor(q).log()
    vars(draft)["logits"] = lambda hidden: logits.expand(len(hidden), -1)
    return draft


def sampled(tokens: Sequence[int], p: Sequence[float], sampling: RequestSampling | None, width: int = 9) -> Sample:
    """Return a request with a prompt of two tokens whose target always has the same probabilities."""
    best = torch.tensor(p).topk(min(width, len(p)))
    rows = len(tokens) - 2
    return Sample(
        request="r",
        tokens=torch.tensor(tokens[:-1]),
        next_token=tokens[-1],
        features=torch.zeros(len(tokens) - 1, 24).bfloat16(),
        known=torch.arange(len(tokens) - 1) >= 1,
        teacher=Teacher(best.indices.expand(rows, -1), best.values.log().expand(rows, -1)),
        sampling=sampling,
    )


def score(draft: EagleDraft, samples: Sequence[Sample], lookahead: int = 1) -> list[float]:
    """Return the mean acceptance of the whole chains of each sample."""
    table = torch.zeros(draft.shape.vocab_size, 8)
    each = simulate_each(draft, table, samples, lookahead)
    return [float(chains.accepted_R[:-lookahead].mean()) for chains in each]


@given(distributions(4), distributions(4))
def test_rejection_sampling_accepts_as_often_as_an_enumeration_of_its_outcomes(p_V: Tensor, q_V: Tensor) -> None:
    accepted_V = [float(q) * min(1.0, float(p) / float(q)) for p, q in zip(p_V, q_V, strict=True)]
    rest_V = [max(float(p) - float(q), 0.0) for p, q in zip(p_V, q_V, strict=True)]
    for token in range(4):
        redrawn = (1 - sum(accepted_V)) * rest_V[token] / max(sum(rest_V), 1e-12)
        output = accepted_V[token] + redrawn
        assert output == pytest.approx(float(p_V[token]), abs=1e-9), "the output has the target's distribution"
        found = rejection_acceptance(p_V[token][None], p_V[None], q_V[token][None], q_V[None])
        assert float(found.rate_A) == pytest.approx(sum(accepted_V))
        assert float(found.given_A) == pytest.approx(accepted_V[token] / output)


@given(distributions(5), distributions(5), st.integers(1, 5))
def test_coupled_choices_are_accepted_at_most_as_often_as_drawn_ones(p_V: Tensor, q_V: Tensor, width: int) -> None:
    each_V = coupled_acceptance(p_V, p_V.expand(5, -1), q_V, q_V.expand(5, -1))
    drawn = rejection_acceptance(p_V, p_V.expand(5, -1), q_V, q_V.expand(5, -1))
    distance = float((p_V - q_V).abs().sum()) / 2
    assert (1 - distance) / (1 + distance) - 1e-9 <= float((p_V * each_V).sum()) <= float(drawn.rate_A[0]) + 1e-9
    recorded = p_V.topk(width).indices
    narrow = rejection_acceptance(p_V, p_V[recorded].expand(5, -1), q_V, q_V[recorded].expand(5, -1))
    assert float(narrow.rate_A[0]) <= float(drawn.rate_A[0]) + 1e-9, "an unrecorded tail lowers the estimate"


def test_coupled_acceptance_is_the_share_of_noise_by_which_both_choose_the_token() -> None:
    generator = torch.Generator().manual_seed(5)
    p_V, q_V = torch.softmax(torch.randn(2, 6, generator=generator, dtype=torch.float64) * 1.5, dim=-1)
    noise_NV = torch.empty(200_000, 6, dtype=torch.float64).exponential_(generator=generator)
    target_N, draft_N = (p_V / noise_NV).argmax(-1), (q_V / noise_NV).argmax(-1)
    recorded = p_V.topk(4).indices
    for token in range(6):
        chosen = target_N == token
        share = float((draft_N[chosen] == token).double().mean())
        own_p_A, own_q_A = p_V[token][None], q_V[token][None]
        assert float(coupled_acceptance(own_p_A, p_V[None], own_q_A, q_V[None])) == pytest.approx(share, abs=0.015)
        narrow = coupled_acceptance(own_p_A, p_V[recorded][None], own_q_A, q_V[recorded][None])
        assert float(narrow) < share + 0.015, "an unrecorded tail lowers the estimate"


def recorded_logprobs(width: int) -> tuple[Teacher, Tensor]:
    """Return recorded distributions, and the complete ones."""
    logprobs = torch.log_softmax(2 * torch.randn(10, 30, generator=torch.Generator().manual_seed(1)), dim=-1)
    best = logprobs.topk(width, dim=-1)
    return Teacher(best.indices, best.values), logprobs


@pytest.mark.parametrize(
    "sampling", [RequestSampling(1.0, 1.0, 0), RequestSampling(0.7, 0.8, 0), RequestSampling(1.3, 0.9, 5)]
)
def test_the_recorded_distribution_equals_the_one_that_the_engine_samples_from(sampling: RequestSampling) -> None:
    teacher, logprobs = recorded_logprobs(30)
    exact = sampling_probs(logprobs, sampling.temperature, sampling.top_p, sampling.top_k)
    probs, _ = apply_sampling(teacher, sampling)
    assert torch.allclose(probs, exact.gather(-1, teacher.ids).double(), atol=1e-5)


def test_at_temperature_1_the_unrecorded_tail_has_its_mass() -> None:
    teacher, logprobs = recorded_logprobs(5)
    probs, _ = apply_sampling(teacher, PLAIN)
    assert torch.allclose(probs, logprobs.exp().gather(-1, teacher.ids).double(), atol=1e-5)


def test_with_top_k_a_narrow_record_is_exact_and_an_unrecorded_token_is_as_likely_as_the_last_one() -> None:
    teacher, logprobs = recorded_logprobs(6)
    sampling = RequestSampling(0.7, 1.0, 6)
    exact = sampling_probs(logprobs, 0.7, 1.0, 6).gather(-1, teacher.ids).double()
    chosen_A = torch.arange(10)
    draft = constant_draft([1 / 20] * 20, 30)
    found = read_choice_probs(draft, torch.zeros(10, 20), teacher, chosen_A, sampling)
    assert torch.allclose(found.p_Ak, exact, atol=1e-5)
    is_recorded_A = (teacher.ids == chosen_A[:, None]).any(-1)
    assert not is_recorded_A.all()
    assert torch.allclose(found.own_p_A[~is_recorded_A], exact[~is_recorded_A].amin(-1))
    assert (found.q_Ak[teacher.ids >= 20] == 0).all(), "outside the draft vocabulary"
    assert (found.q_Ak[teacher.ids < 20] > 0).all()


def test_a_draft_that_agrees_with_a_sampled_target_scores_above_one_that_is_sure_of_its_favourite() -> None:
    tokens = [0, 1, *[0, 0, 0, 0, 0, 1, 1, 1, 2, 2]]
    served, greedy, unknown = (
        sampled(tokens, TARGET, sampling) for sampling in (PLAIN, RequestSampling(0, 1, 0), None)
    )
    agreeing, sure = constant_draft(TARGET), constant_draft(PEAKED)
    assert score(agreeing, [served]) == pytest.approx([1.0])
    assert score(sure, [served]) == pytest.approx([0.5 + 0.01 + 0.01])
    assert score(agreeing, [greedy, unknown]) == score(sure, [greedy, unknown])


@pytest.mark.parametrize(
    "sampling", [RequestSampling(0.5, 1.0, 0), RequestSampling(0.8, 0.7, 0), RequestSampling(1, 1, 2)]
)
def test_a_sample_is_scored_by_the_distributions_that_it_was_served_with(sampling: RequestSampling) -> None:
    p_V, q_V = (
        sampling_probs(torch.tensor([p]).log(), sampling.temperature, sampling.top_p, sampling.top_k)[0]
        for p in (TARGET, (0.3, 0.4, 0.3))
    )
    expected = sum(min(float(p), float(q)) for p, q in zip(p_V, q_V, strict=True))
    (found,) = score(constant_draft((0.3, 0.4, 0.3)), [sampled([0, 1, 0, 1, 0, 0], TARGET, sampling)])
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_verify_steps_are_those_of_serving_over_all_outputs_of_the_target() -> None:
    draft, found = constant_draft((0.2, 0.5, 0.3)), [0.0, 0.0]
    rate = 0.2 + 0.3 + 0.2

    def serve(room: int) -> tuple[float, float]:
        """Return expected accepted tokens and verify steps until `room` tokens are put out, the last one as a bonus."""
        accepted, steps = 0.0, float(room > 0)
        for kept in range(min(2, room - 1) + 1):
            chance = rate**kept * (1 if kept == min(2, room - 1) else 1 - rate)
            later = serve(room - kept - 1)
            accepted, steps = accepted + chance * (kept + later[0]), steps + chance * later[1]
        return accepted, steps

    for output in product(range(3), repeat=4):
        chance = math.prod(TARGET[token] for token in output)
        walked = simulate_acceptance(draft, torch.zeros(3, 8), [sampled([0, 1, 0, *output], TARGET, PLAIN)], 2)
        found = [mean + chance * value for mean, value in zip(found, walked, strict=True)]
    assert found == pytest.approx(serve(4), rel=1e-5)


def test_samples_of_different_sampling_and_record_width_are_scored_as_each_alone() -> None:
    samples = [
        sampled([0, 1, 1, 0, 2, 0, 0, 1], TARGET, PLAIN),
        sampled([0, 1, 1, 0, 2, 0, 0, 1], TARGET, PLAIN, width=2),
        sampled([0, 1, 1, 0, 2, 0, 0, 1], TARGET, RequestSampling(0.5, 0.9, 0), width=2),
        sampled([0, 1, 1, 0, 2, 0, 0, 1], TARGET, RequestSampling(0, 1, 0)),
        sampled([0, 1, 1, 0, 2, 0], TARGET, None),
    ]
    draft = constant_draft((0.3, 0.4, 0.3))
    together = score(draft, samples, 2)
    assert together == pytest.approx([score(draft, [one], 2)[0] for one in samples])
    assert len({round(one, 6) for one in together[:4]}) == 4


def test_a_sample_its_parts_and_joined_chunks_keep_their_sampling() -> None:
    sampling = {"temperature": 0.75, "top_p": 0.5, "sampling_top_k": 20}
    verify_steps = conversation(range(1, 14), 3)
    records = [
        record_of("r", verify_steps[:3], 0, last=False, **sampling),
        record_of("r", verify_steps[3:], 1, chunk=1, **sampling),
    ]
    first, second = tables_of(*records)["accepted"].to_pylist()
    whole = join_samples([read_sample(first, []), read_sample(second, [])])
    assert whole.sampling == RequestSampling(0.75, 0.5, 20)
    assert {part.sampling for part in split_sample(whole, 4, 2)} == {whole.sampling}
    assert read_sample({**first, "temperature": None, "top_p": None, "sampling_top_k": None}, []).sampling is None
