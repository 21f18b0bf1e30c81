"""The acceptance rule against brute force: greedy by definition, sampled by the distribution of what comes out.

The sampled rule is run with a generator of uniform numbers that is enumerated instead of drawn: the cell of every
decision is integrated exactly, so the output distribution is compared with the target's without statistics.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from schemas.speculator import acceptance
from schemas.speculator.acceptance import Verdict, accept_greedy, accept_sampled, sampling_probs
from schemas.tree import rejected_branches

V = 4


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=5).flatmap(lambda d: st.tuples(st.just(d), _choices(len(d) + 1))))
def test_greedy_keeps_what_the_target_would_have_said(case: tuple[list[int], list[int]]) -> None:
    draft, argmax = case
    verdict = accept_greedy(draft, argmax)
    right = [draft[:n] == argmax[:n] for n in range(len(draft) + 1)]
    assert verdict.accepted == max(n for n, whole in enumerate(right) if whole)
    assert [*draft[: verdict.accepted], verdict.bonus] == argmax[: verdict.accepted + 1]


def _choices(n: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 2), min_size=n, max_size=n)


def distributions(rows: int, seed: int, *, sparse: bool) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    probs = torch.rand(rows, V, generator=g, dtype=torch.float64) + 0.02
    if sparse:
        probs[torch.rand(rows, V, generator=g) < 0.4] = 0
        probs[torch.arange(rows), torch.randint(0, V, (rows,), generator=g)] += 0.5
    return probs / probs.sum(-1, keepdim=True)


class Enumerated:
    """Takes the place of chance: follows one path of decisions and multiplies up its probability."""

    def __init__(self, decisions: list[int]) -> None:
        self.decisions = decisions
        self.taken: list[int] = []
        self.options: list[int] = []
        self.probability = 1.0

    def _decide(self, chances: list[float]) -> int:
        i = len(self.taken)
        choice = self.decisions[i] if i < len(self.decisions) else 0
        self.taken.append(choice)
        self.options.append(len(chances))
        self.probability *= chances[choice]
        return choice

    def draw(self, probs_V: Tensor, generator: object) -> int:
        return self._decide(probs_V.tolist())

    def uniform(self, threshold: float) -> float:
        """A number below the threshold, or above it."""
        return threshold / 2 if self._decide([threshold, 1 - threshold]) == 0 else (1 + threshold) / 2


def every_path(run: object) -> Iterator[tuple[tuple[int, ...], float]]:
    """All outcomes of ``run(chance)`` with their probabilities."""
    decisions: list[int] = []
    while True:
        chance = Enumerated(decisions)
        outcome = run(chance)  # type: ignore[operator]
        yield outcome, chance.probability
        decisions = chance.taken
        options = chance.options
        while decisions and decisions[-1] + 1 == options[len(decisions) - 1]:
            decisions = decisions[:-1]
        if not decisions:
            return
        decisions = [*decisions[:-1], decisions[-1] + 1]


def exact_output(
    p_of: dict[tuple[int, ...], Tensor], q_of: dict[tuple[int, ...], Tensor], m: int
) -> dict[tuple[int, ...], float]:
    """Distribution of the first ``m + 1`` tokens: one speculative round, then the target alone where it fell short."""

    def run(chance: Enumerated) -> tuple[int, ...]:
        chain: tuple[int, ...] = ()
        while len(chain) < m:
            chain = (*chain, chance.draw(q_of[chain], None))
        q = torch.stack([q_of[chain[:i]] for i in range(m)])
        p = torch.stack([p_of[chain[:i]] for i in range(m + 1)])
        at = itertools.count()

        def uniform(*_: object, **__: object) -> Tensor:
            i = next(at)
            threshold = min(1.0, float(p[i, chain[i]] / q[i, chain[i]]))
            return torch.tensor(chance.uniform(threshold), dtype=torch.float64)

        with mock.patch.object(acceptance, "_draw", chance.draw), mock.patch.object(torch, "rand", uniform):
            verdict = accept_sampled(chain, q, p, None)
        out = (*chain[: verdict.accepted], verdict.bonus)
        while len(out) < m + 1:
            out = (*out, chance.draw(p_of[out], None))
        return out

    found: dict[tuple[int, ...], float] = defaultdict(float)
    for outcome, probability in every_path(run):
        if probability > 0:
            found[outcome] += probability
    return found


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


def test_the_enumeration_can_tell_a_wrong_rule() -> None:
    """Drawing the replacement from p instead of (p - q)+ is a common mistake; the comparison must see it."""
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
    """Chi-square over 16 pairs of tokens, 8,000 rounds, bound at one in a million.

    With 15 degrees of freedom the bound is 56.5. Moving 4 % of the mass from one token to another (noncentrality
    8000 * sum (d^2 / p), about 2 * 0.04^2 / 0.0625 * 8000 = 410) passes unseen with a chance below 1e-12.
    """
    g = torch.Generator().manual_seed(11)
    p = distributions(2, 5, sparse=False)
    q = distributions(1, 6, sparse=False)
    rounds, seen = 8000, Counter[tuple[int, int]]()
    drafted = torch.multinomial(q[0], rounds, replacement=True, generator=g).tolist()
    for token in drafted:
        verdict = accept_sampled([token], q, p, g)
        out = [token, verdict.bonus] if verdict.accepted else [verdict.bonus]
        if len(out) == 1:
            out.append(int(torch.multinomial(p[1], 1, generator=g)))
        seen[out[0], out[1]] += 1
    wanted = {(a, b): float(p[0, a] * p[1, b]) * rounds for a in range(V) for b in range(V)}
    assert sum((seen[pair] - n) ** 2 / n for pair, n in wanted.items()) < 56.5


def test_a_draft_equal_to_the_target_is_always_kept() -> None:
    p = distributions(4, 3, sparse=False)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        chain = [int(torch.multinomial(p[i], 1, generator=g)) for i in range(3)]
        assert accept_sampled(chain, p[:3], p, g).accepted == 3


def test_what_the_target_excludes_is_never_said() -> None:
    p = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2)
    q = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    g = torch.Generator().manual_seed(0)
    assert {accept_sampled([0], q, p, g) for _ in range(100)} == {Verdict(0, 1)}


def test_the_same_seed_gives_the_same_verdicts() -> None:
    p, q = distributions(3, 1, sparse=False), distributions(2, 2, sparse=False)

    def run(seed: int) -> list[Verdict]:
        g = torch.Generator().manual_seed(seed)
        return [accept_sampled([1, 2], q, p, g) for _ in range(40)]

    assert run(3) == run(3)
    assert run(3) != run(4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=9),
    st.floats(0.05, 5.0),
    st.floats(0.01, 1.0),
)
def test_the_nucleus_is_the_smallest_set_that_reaches_its_mass(
    logits: list[float], temperature: float, top_p: float
) -> None:
    found = sampling_probs(torch.tensor([logits]), temperature, top_p)[0]
    full = torch.softmax(torch.tensor(logits) / temperature, -1)
    kept = found > 0
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    assert float(full[kept].sum()) >= top_p - 1e-5
    if top_p < 1 and int(kept.sum()) > 1:
        assert float(full[kept].sum() - full[kept].min()) < top_p + 1e-5
    assert not (~kept).any() or float(full[~kept].max()) <= float(full[kept].min()) + 1e-7
    torch.testing.assert_close(found[kept], full[kept] / full[kept].sum(), rtol=1e-4, atol=1e-7)


@settings(deadline=None)
@given(st.integers(0, 6).flatmap(lambda m: st.tuples(*(st.integers(-1, i - 1) for i in range(m)))), st.integers(0, 99))
def test_rejected_branches_are_the_paths_to_leaves_off_the_accepted_path(parents: tuple[int, ...], pick: int) -> None:
    def path(node: int) -> tuple[int, ...]:
        return (*path(parents[node]), node) if node >= 0 else ()

    accepted = path(pick % (len(parents) + 1) - 1)
    leaves = [node for node in range(len(parents)) if node not in parents]
    assert rejected_branches(parents, accepted) == [path(leaf) for leaf in leaves if leaf not in accepted]


@pytest.mark.parametrize(
    ("accepted", "branches"), [([], [(0, 1, 2)]), ([0], [(0, 1, 2)]), ([0, 1], [(0, 1, 2)]), ([0, 1, 2], [])]
)
def test_a_chain_has_one_rejected_branch_or_none(accepted: list[int], branches: list[tuple[int, ...]]) -> None:
    assert rejected_branches([-1, 0, 1], accepted) == branches
