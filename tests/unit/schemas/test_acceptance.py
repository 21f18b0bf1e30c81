"""The acceptance rule against brute force: greedy by its definition, sampled by its output distribution.

The sampled rule runs over every random outcome (``enumerated_chance``), so its output distribution is exact and needs
no statistics. Trees with branches are in ``test_acceptance_trees``.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from unittest import mock

import pytest
import torch
from enumerated_chance import Chance, accept_with, distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from schemas.draft_tree import chain
from schemas.speculator.acceptance import (
    SampledRows,
    Verdict,
    accept_greedy,
    accept_sampled,
    draw_token,
    sampling_probs,
)

V = 4


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=5).flatmap(lambda d: st.tuples(st.just(d), _choices(len(d) + 1))))
def test_greedy_accepts_the_longest_prefix_that_the_target_would_choose(case: tuple[list[int], list[int]]) -> None:
    draft, argmax = case
    verdict = accept_greedy(draft, chain(len(draft)), argmax)
    right = [draft[:n] == argmax[:n] for n in range(len(draft) + 1)]
    kept = len(verdict.path)
    assert kept == max(n for n, whole in enumerate(right) if whole)
    assert [*draft[:kept], verdict.bonus] == argmax[: kept + 1]


def _choices(n: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 2), min_size=n, max_size=n)


def distributions(rows: int, seed: int, *, sparse: bool) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    probs = torch.rand(rows, V, generator=g, dtype=torch.float64) + 0.02
    if sparse:
        probs[torch.rand(rows, V, generator=g) < 0.4] = 0
        probs[torch.arange(rows), torch.randint(0, V, (rows,), generator=g)] += 0.5
    return probs / probs.sum(-1, keepdim=True)


def exact_output(
    p_of: dict[tuple[int, ...], Tensor], q_of: dict[tuple[int, ...], Tensor], m: int
) -> dict[tuple[int, ...], float]:
    """Distribution of the first ``m + 1`` tokens: one speculative verify step, then the target alone where it fell
    short.
    """

    def run(chance: Chance) -> tuple[int, ...]:
        drafted: tuple[int, ...] = ()
        while len(drafted) < m:
            drafted = (*drafted, chance.draw(q_of[drafted]))
        q = torch.stack([q_of[drafted[:i]] for i in range(m)])
        p = torch.stack([p_of[drafted[:i]] for i in range(m + 1)])
        verdict = accept_with(chance, drafted, chain(m), p, q)
        out = (*(drafted[node] for node in verdict.path), verdict.bonus)
        while len(out) < m + 1:
            out = (*out, chance.draw(p_of[out]))
        return out

    return distribution(run)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_sampled_output_has_exactly_the_targets_distribution(seed: int, sparse: bool) -> None:
    """All chains of two drafted tokens over a vocabulary of four; target and draft depend on the whole context."""
    m = 2
    contexts = [c for n in range(m + 1) for c in itertools.product(range(V), repeat=n)]
    p_rows = distributions(len(contexts), seed, sparse=sparse)
    q_rows = distributions(len(contexts), seed + 100, sparse=sparse)
    p_of = dict(zip(contexts, p_rows, strict=True))
    q_of = dict(zip(contexts, q_rows, strict=True))
    found = exact_output(p_of, q_of, m)
    assert sum(found.values()) == pytest.approx(1)
    for tokens in itertools.product(range(V), repeat=m + 1):
        wanted = math.prod(float(p_of[tokens[:i]][token]) for i, token in enumerate(tokens))
        assert found.get(tokens, 0.0) == pytest.approx(wanted, abs=1e-12), tokens


def test_the_enumeration_detects_a_wrong_rule() -> None:
    """Drawing the replacement from p instead of (p - q)+ is a common mistake."""
    contexts = [c for n in range(2) for c in itertools.product(range(V), repeat=n)]
    p_of = dict(zip(contexts, distributions(len(contexts), 0, sparse=False), strict=True))
    q_of = dict(zip(contexts, distributions(len(contexts), 1, sparse=False), strict=True))
    with mock.patch.object(Tensor, "clamp_min_", lambda residual, _: residual.clamp(min=0) * 0):
        found = exact_output(p_of, q_of, 1)
    first = Counter[int]()
    for tokens, probability in found.items():
        first[tokens[0]] += probability  # type: ignore[assignment]
    assert max(abs(first[t] - float(p_of[()][t])) for t in range(V)) > 0.01


def test_real_randomness_gives_the_targets_distribution() -> None:
    """Chi-square over 16 pairs of tokens, 8,000 verify steps, bound at one in a million.

    With 15 degrees of freedom the bound is 56.5. Moving 4 % of the mass from one token to another (noncentrality
    8000 * sum (d^2 / p), about 2 * 0.04^2 / 0.0625 * 8000 = 410) passes unseen with a chance below 1e-12.
    """
    g = torch.Generator().manual_seed(11)
    p = distributions(2, 5, sparse=False)
    q = distributions(1, 6, sparse=False)
    verify_steps, seen = 8000, Counter[tuple[int, int]]()
    drafted = torch.multinomial(q[0], verify_steps, replacement=True, generator=g).tolist()
    for token in drafted:
        verdict = accept_sampled([token], chain(1), p, g, q)
        out = [token, verdict.bonus] if verdict.path else [verdict.bonus]
        if len(out) == 1:
            out.append(int(torch.multinomial(p[1], 1, generator=g)))
        seen[out[0], out[1]] += 1
    wanted = {(a, b): float(p[0, a] * p[1, b]) * verify_steps for a in range(V) for b in range(V)}
    assert sum((seen[pair] - n) ** 2 / n for pair, n in wanted.items()) < 56.5


def test_a_draft_with_the_targets_distribution_is_always_accepted() -> None:
    p = distributions(4, 3, sparse=False)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        drafted = [int(torch.multinomial(p[i], 1, generator=g)) for i in range(3)]
        assert accept_sampled(drafted, chain(3), p, g, p[:3]).path == (0, 1, 2)


def test_a_token_that_the_target_excludes_is_never_output() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2)
    q = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    g = torch.Generator().manual_seed(0)
    assert {accept_sampled([0], chain(1), p, g, q) for _ in range(100)} == {Verdict((), 1)}


def test_the_same_seed_gives_the_same_verdicts() -> None:
    p, q = distributions(3, 1, sparse=False), distributions(2, 2, sparse=False)

    def run(seed: int) -> list[Verdict]:
        g = torch.Generator().manual_seed(seed)
        return [accept_sampled([1, 2], chain(2), p, g, q) for _ in range(40)]

    assert run(3) == run(3)
    assert run(3) != run(4)


def by_definition(full: list[float], top_p: float, top_k: int) -> list[float]:
    """Top-k, then top-p over the remaining tokens, token by token; ties with the last kept token stay."""
    left = [p for p in full if top_k == 0 or sum(other > p for other in full) < top_k]
    total = sum(sorted(left, reverse=True))
    mass, least = 0.0, 0.0
    for least in sorted(left, reverse=True):
        mass += least
        if top_p < 1 and mass >= top_p * total:
            break
    share = math.fsum(p for p in full if p >= least)
    return [p / share if p >= least else 0.0 for p in full]


TIED = st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0]), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.lists(st.floats(-8, 8), min_size=1, max_size=12), TIED),
    st.floats(0.05, 5.0),
    st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.25, 0.5, 0.75])),
    st.integers(0, 13),
)
def test_sampling_applies_temperature_then_top_k_then_top_p(
    logits: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    found = sampling_probs(torch.tensor([logits]), temperature, top_p, top_k)[0]
    wanted = by_definition(torch.softmax(torch.tensor([logits]) / temperature, -1)[0].tolist(), top_p, top_k)
    assert [p > 0 for p in found.tolist()] == [p > 0 for p in wanted]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 5e-324])
def test_tiny_temperatures_choose_the_likeliest_token(temperature: float) -> None:
    found = sampling_probs(torch.tensor([[-1e4, 3.0, 60000.0, 59999.0]]), temperature, 0.9, 3)
    assert found.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, [0, 1, 2, 3, 4]),
        (0.5, 0, [0, 1, 2]),  # the third as likely as the second
        (0.39, 0, [0]),
        (1.0, 1, [0]),
        (1.0, 2, [0, 1, 2]),  # the third as likely as the second
        (1.0, 4, [0, 1, 2, 3]),
        (0.5, 1, [0]),
        (0.85, 4, [0, 1, 2]),
        (0.41, 0, [0, 1, 2]),
        (0.42, 3, [0]),  # 0.4 is half of what top-k left
        (1.0, 9, [0, 1, 2, 3, 4]),
    ],
)
def test_the_limits_of_top_k_and_top_p(top_p: float, top_k: int, kept: list[int]) -> None:
    full = torch.tensor([[0.4, 0.2, 0.2, 0.125, 0.075]])
    found = sampling_probs(full.log(), 1.0, top_p, top_k)
    assert found[0].nonzero().flatten().tolist() == kept
    torch.testing.assert_close(found[0, kept], full[0, kept] / full[0, kept].sum())


def test_rows_computed_on_access_equal_those_of_the_whole() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2)) * 2
    rows = SampledRows(logits, 0.8, 0.9, 20)
    whole = sampling_probs(logits, 0.8, 0.9, 20)
    torch.testing.assert_close(torch.stack([rows[i] for i in range(3)]), whole)


@pytest.mark.parametrize(
    ("probs", "tokens"),
    [
        ([0.25, 0, 0.5, 0.25], [0, 0, 2, 2, 2, 2, 3, 3]),
        ([0, 1, 0, 0], [1] * 8),
        ([0, 0.5, 0, 1.5, 0], [1, 1, 3, 3, 3, 3, 3, 3]),
    ],
)
def test_a_token_is_drawn_as_often_as_its_probability_says(probs: list[float], tokens: list[int]) -> None:
    with mock.patch.object(torch, "rand", side_effect=torch.arange(0, 1, 1 / 8, dtype=torch.float64).unbind()):
        assert [draw_token(torch.tensor(probs), None) for _ in range(8)] == tokens


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-7, 0.3, 1.0, 2 / 3]), min_size=1, max_size=20).filter(any))
def test_a_token_without_mass_is_not_drawn_even_by_the_extreme_random_numbers(probs: list[float]) -> None:
    for u in (0.0, 1 - 2**-53):
        with mock.patch.object(torch, "rand", return_value=torch.tensor(u, dtype=torch.float64)):
            assert probs[draw_token(torch.tensor(probs), None)] > 0


def test_logits_that_are_not_finite_raise_an_error() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        draw_token(torch.tensor([0.5, math.nan, 0.5]), None)
