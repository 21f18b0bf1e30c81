"""Draft trees: greedy against every branch by itself, sampled against the target's distribution.

The target over a small vocabulary is a table for every context. The exact tests run the real function over every
random outcome; the chi-square test runs it with real random numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from enumerated_chance import Chance, accept_with, distribution
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, ncx2
from torch import Tensor

from schemas.draft_tree import chain, depths
from schemas.speculator import acceptance
from schemas.speculator.acceptance import Verdict, accept_greedy, accept_sampled, sampling_probs

Path = tuple[int, ...]


class Sampling(NamedTuple):
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


SAMPLINGS = [Sampling(), Sampling(0.7, 0.9), Sampling(1.2, 1.0, 4), Sampling(1.5, 0.8, 5)]


class Model:
    """Next-token distributions for every context of up to ``depth`` tokens."""

    def __init__(self, logits: Tensor, vocabulary: int, depth: int, sampling: Sampling) -> None:
        self.vocabulary, self.depth = vocabulary, depth
        self.contexts = [c for n in range(depth + 1) for c in itertools.product(range(vocabulary), repeat=n)]
        self._row = {context: i for i, context in enumerate(self.contexts)}
        probs = sampling_probs(logits, *sampling).double()
        self._probs = probs / probs.sum(-1, keepdim=True)

    def __getitem__(self, context: Path) -> Tensor:
        return self._probs[self._row[context]]

    def after(self, contexts: Sequence[Path]) -> Tensor:
        """[1 + m, V] distributions after the root and after each node."""
        return torch.stack([self[context] for context in [(), *contexts]])

    def joint(self) -> Tensor:
        """[V, V, ..] probability of every sequence of ``depth + 1`` tokens."""
        joint = torch.ones((), dtype=torch.float64)
        for n in range(self.depth + 1):
            level = torch.stack([self[c] for c in self.contexts if len(c) == n])
            joint = joint[..., None] * level.view(*joint.shape, self.vocabulary)
        return joint


def pair(vocabulary: int, depth: int, seed: int, sampling: Sampling) -> tuple[Model, Model]:
    """A target, and a draft that resembles it."""
    g = torch.Generator().manual_seed(seed)
    rows = sum(vocabulary**n for n in range(depth + 1))
    logits = torch.randn(rows, vocabulary, generator=g) * 1.5
    drafts = logits + torch.randn(rows, vocabulary, generator=g)
    return Model(logits, vocabulary, depth, sampling), Model(drafts, vocabulary, depth, sampling)


def contexts_of(tokens: Sequence[int], parents: Sequence[int]) -> list[Path]:
    found: list[Path] = []
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def most_likely_tree(draft: Model, nodes: int) -> tuple[list[int], list[int]]:
    """Tokens and parents of the nodes to which the draft gives the largest cumulated probability."""
    mass: dict[Path, float] = {(): 1.0}
    for c in draft.contexts[1:]:
        mass[c] = mass[c[:-1]] * float(draft[c[:-1]][c[-1]])
    kept = sorted(draft.contexts[1:], key=lambda c: (-mass[c], len(c)))[:nodes]
    return [c[-1] for c in kept], [kept.index(c[:-1]) if len(c) > 1 else -1 for c in kept]


def output_of(tokens: Sequence[int], verdict: Verdict) -> Path:
    return (*(tokens[node] for node in verdict.path), verdict.bonus)


def continue_with_target(found: dict[Path, float], joint: Tensor) -> Tensor:
    """Distribution of complete sequences if the target alone continues after the output of a verify step."""
    whole = torch.zeros_like(joint)
    for prefix, probability in found.items():
        whole[prefix] += probability * joint[prefix] / joint[prefix].sum()
    return whole


@st.composite
def trees(draw: st.DrawFn, nodes: int, vocabulary: int, deepest: int = 99) -> tuple[list[int], list[int]]:
    m = draw(st.integers(0, nodes))
    parents = [draw(st.integers(-1, i - 1)) for i in range(m)]
    assume(max(depths(parents), default=0) <= deepest)
    return [draw(st.integers(0, vocabulary - 1)) for _ in range(m)], parents


@settings(deadline=None)
@given(trees(nodes=10, vocabulary=3), st.data())
def test_greedy_accepts_the_longest_path_that_any_branch_alone_would_accept(
    tree: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    tokens, parents = tree
    assume(len(set(zip(parents, tokens, strict=True))) == len(tokens))
    argmax = data.draw(st.lists(st.integers(0, 2), min_size=len(tokens) + 1, max_size=len(tokens) + 1))
    verdict = accept_greedy(tokens, parents, argmax)
    outputs: list[Path] = [(argmax[0],)]
    for leaf in range(len(tokens)):
        branch = [leaf]
        while parents[branch[0]] >= 0:
            branch.insert(0, parents[branch[0]])
        drafted = [tokens[node] for node in branch]
        choices = [argmax[0], *(argmax[1 + node] for node in branch)]
        outputs.append(output_of(drafted, accept_greedy(drafted, chain(len(branch)), choices)))
    assert output_of(tokens, verdict) == max(outputs, key=len)
    assert [parents[node] for node in verdict.path] == [-1, *verdict.path][: len(verdict.path)]


@settings(deadline=None)
@given(trees(nodes=10, vocabulary=2), st.data())
def test_greedy_output_is_the_targets_if_siblings_have_the_same_token(
    tree: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    tokens, parents = tree
    contexts = contexts_of(tokens, parents)
    choice = {context: data.draw(st.integers(0, 1)) for context in [(), *contexts]}
    out = output_of(tokens, accept_greedy(tokens, parents, [choice[context] for context in [(), *contexts]]))
    assert all(choice[out[:i]] == token for i, token in enumerate(out))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("nodes", [5, 10])
def test_a_tree_of_the_most_likely_tokens_preserves_the_targets_distribution(nodes: int, sampling: Sampling) -> None:
    """Every sequence of four tokens over a vocabulary of seven, to 12 decimals."""
    target, draft = pair(7, 3, seed=nodes, sampling=sampling)
    tokens, parents = most_likely_tree(draft, nodes)
    p = target.after(contexts_of(tokens, parents))
    found = distribution(lambda chance: output_of(tokens, accept_with(chance, tokens, parents, p)))
    joint = target.joint()
    assert max(len(prefix) for prefix in found) > 2, "no path of two nodes can be kept: the test holds too little"
    torch.testing.assert_close(continue_with_target(found, joint), joint, rtol=0, atol=1e-12, equal_nan=False)


@settings(max_examples=60, deadline=None)
@given(trees(nodes=6, vocabulary=3, deepest=3), st.integers(0, 9999), st.sampled_from(SAMPLINGS))
def test_any_tree_preserves_the_targets_distribution(
    tree: tuple[list[int], list[int]], seed: int, sampling: Sampling
) -> None:
    """Also if siblings have the same token, exhaust the vocabulary, or are excluded by the target."""
    tokens, parents = tree
    target, _ = pair(3, 3, seed, sampling)
    p = target.after(contexts_of(tokens, parents))
    found = distribution(lambda chance: output_of(tokens, accept_with(chance, tokens, parents, p)))
    torch.testing.assert_close(continue_with_target(found, target.joint()), target.joint(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("sampling", SAMPLINGS[:2])
def test_randomly_drawn_siblings_preserve_the_targets_distribution(sampling: Sampling, again: bool) -> None:
    """Two siblings with a child each, drawn independently or the second from what the first left over."""
    target, draft = pair(3, 2, seed=5, sampling=sampling)
    parents = [-1, -1, 0, 1]

    def run(chance: Chance) -> Path:
        first = draft[()]
        tokens = [chance.draw(first)]
        second = first.clone()
        if not again:
            second[tokens[0]] = 0
            second /= second.sum()
        tokens.append(chance.draw(second))
        below = [draft[token,] for token in tokens]
        tokens += [chance.draw(q) for q in below]
        p = target.after(contexts_of(tokens, parents))
        return output_of(tokens, accept_with(chance, tokens, parents, p, torch.stack([first, second, *below])))

    torch.testing.assert_close(
        continue_with_target(distribution(run), target.joint()), target.joint(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("wrong", ["the rejected token stays", "p is not renormalised"])
def test_the_comparison_detects_a_wrong_rule(wrong: str) -> None:
    def keep_mass(p: Tensor, token: int, _: object) -> Tensor:
        return p if wrong == "the rejected token stays" else p.masked_fill(torch.arange(len(p)) == token, 0)

    target, draft = pair(7, 3, seed=8, sampling=Sampling())
    tokens, parents = most_likely_tree(draft, 8)
    p = target.after(contexts_of(tokens, parents))
    with mock.patch.object(acceptance, "_after_rejection", keep_mass):
        found = distribution(lambda chance: output_of(tokens, accept_with(chance, tokens, parents, p)))
    assert float((continue_with_target(found, target.joint()) - target.joint()).abs().sum()) > 0.01


def test_the_bonus_token_after_a_complete_path_is_drawn_from_its_last_nodes_distribution() -> None:
    certain, last = torch.eye(4)[[2, 1]], torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    other = torch.tensor([[1.0, 0, 0, 0]])
    p = torch.cat([certain[:1], other, certain[1:], other, last])  # the root, then nodes 0 to 3
    with mock.patch.object(acceptance, "draw_token", return_value=3) as drawn:
        assert accept_sampled([0, 2, 0, 1], [-1, -1, 1, 1], p, torch.Generator()) == Verdict((1, 3), 3)
    assert torch.equal(drawn.call_args.args[0], last[0])


def test_a_rejection_that_leaves_no_mass_outputs_the_targets_token() -> None:
    """Rounding can make a certain token's probability slightly less than one; the output is still that token."""
    almost = torch.tensor(1 - 2**-24)
    p = torch.stack([torch.tensor([0, almost, 0]), *torch.eye(3)[[1, 2]]])
    with mock.patch.object(torch, "rand", return_value=almost):
        assert accept_sampled([1, 0], [-1, -1], p, None) == Verdict((), 1)


DRAWS, ALPHA, VARIATION = 10_000, 1e-6, 0.05


def first_pairs(target: Model, draft: Model, *, drawn: bool) -> Tensor:
    """[V, V] how often each pair of first tokens was output in ``DRAWS`` verify steps with real random numbers."""
    g = torch.Generator().manual_seed(3)
    seen = torch.zeros(target.vocabulary, target.vocabulary, dtype=torch.float64)
    tokens, parents = most_likely_tree(draft, 8)
    q = None
    for _ in range(DRAWS):
        if drawn:
            tokens, parents = [], list(chain(3))
            for _ in range(3):
                tokens.append(int(torch.multinomial(draft[tuple(tokens)], 1, generator=g)))
            q = draft.after(contexts_of(tokens, parents))[:3]
        out = output_of(tokens, accept_sampled(tokens, parents, target.after(contexts_of(tokens, parents)), g, q))
        if len(out) < 2:
            out = (*out, int(torch.multinomial(target[out], 1, generator=g)))
        seen[out[:2]] += 1
    return seen


def chi_square(seen: Tensor, probs: Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom. Cells expected less than five times are merged."""
    wanted = probs * seen.sum()
    rare = wanted < 5
    cells = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    counts = torch.cat([seen[~rare], seen[rare].sum()[None]])
    possible = cells > 0
    return float(((counts - cells)[possible] ** 2 / cells[possible]).sum()), int(possible.sum()) - 1


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, 0.9, 6)])
def test_real_randomness_gives_the_targets_distribution(sampling: Sampling, drawn: bool) -> None:
    """Chi-square over the pairs of first tokens out of a vocabulary of eight: at most 63 degrees of freedom.

    A distribution p' at total variation d from p has sum (p' - p)^2 / p >= (sum |p' - p|)^2 = 4 d^2, so n draws give a
    noncentrality of at least 4 n d^2. With 10,000 draws and alpha = 1e-6, d = 0.05 is seen with a probability above 0.9
    (asserted), d = 0.06 above 0.99.
    """
    target, draft = pair(8, 3, seed=21, sampling=sampling)
    seen, probs = first_pairs(target, draft, drawn=drawn), target.joint().sum((-1, -2))
    assert seen[probs == 0].sum() == 0
    found, freedom = chi_square(seen, probs)
    bound = chi2.isf(ALPHA, freedom)
    assert ncx2.sf(bound, freedom, 4 * DRAWS * VARIATION**2) > 0.9
    assert found < bound


def test_the_chi_square_test_detects_a_wrong_rule() -> None:
    """A rejected candidate that keeps its mass is output too often."""
    target, draft = pair(8, 3, seed=21, sampling=Sampling())
    with mock.patch.object(acceptance, "_after_rejection", lambda p, *_: p):
        found, freedom = chi_square(first_pairs(target, draft, drawn=False), target.joint().sum((-1, -2)))
    assert found > chi2.isf(ALPHA, freedom)
