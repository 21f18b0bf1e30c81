"""Whose tokens fill a row, by what was measured of each drafter."""

from __future__ import annotations

import random

import pytest

from schemas.suffix_corpus import END, NO_MATCH, Match
from schemas.trace.record import DraftSource
from serving.planner.acceptance_model import ChainModel
from serving.planner.row_planner import NO_CHAIN, RowPlanner, SuffixChain, token_sources

SPECULATOR, SUFFIX = DraftSource.SPECULATOR, DraftSource.SUFFIX
BOTH = SPECULATOR | SUFFIX
V = 100


def planner(depth: int = 3) -> RowPlanner:
    return RowPlanner(depth, V)


def observe(planner: RowPlanner, match: Match, speculator: list[int], output: list[int], times: int) -> None:
    for _ in range(times):
        chain = planner.chain(match, greedy=True)
        planner.observe(chain, speculator, output, greedy=True, weight=1.0)


@pytest.mark.parametrize(
    ("row", "speculator", "suffix", "sources"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], [], (SPECULATOR,) * 3, id="no suffix chain"),
        pytest.param([1, 2, 3], [4, 2, 3], [1, 2, 3], (SUFFIX,) * 3, id="a whole suffix chain"),
        pytest.param([1, 2, 3], [1, 5, 3], [1, 2, 3], (BOTH, SUFFIX, SUFFIX), id="both agree at first"),
        pytest.param([1, 2, 3], [4, 2, 3], [1], (SUFFIX,), id="the end of the row follows other tokens"),
        pytest.param([1, 2, 3], [1, 2, 3], [1], (BOTH, SPECULATOR, SPECULATOR), id="the speculator goes on"),
        pytest.param([1, 2, 3], [1, 2, 3], [1, 7, 3], (BOTH, SPECULATOR, SPECULATOR), id="the other chain"),
    ],
)
def test_a_drafter_proposed_a_token_only_with_all_tokens_before_it(
    row: list[int], speculator: list[int], suffix: list[int], sources: tuple[int, ...]
) -> None:
    assert token_sources(row, speculator, suffix) == sources


def test_a_chain_ends_before_a_number_that_is_no_token() -> None:
    assert planner().chain(Match(4, [[7, V, 8]]), greedy=True).tokens == (7,)
    assert planner().chain(Match(4, [[7, END]]), greedy=True).tokens == (7,)
    assert planner(2).chain(Match(4, [[7, 8, 9]]), greedy=True).tokens == (7, 8)
    assert planner().chain(NO_MATCH, greedy=True) == NO_CHAIN


def test_a_suffix_chain_takes_the_place_of_an_untrained_draft_and_not_of_a_better_one() -> None:
    chosen, match = planner(), Match(4, [[1, 2, 3]])

    def prefers(*, greedy: bool = True) -> bool:
        return chosen.prefers(chosen.chain(match, greedy=greedy), 3, greedy=greedy)

    assert prefers()
    observe(chosen, match, [4, 5, 6], [4, 5, 6, 7], 60)
    assert not prefers()
    assert prefers(greedy=False), "acceptance of sampled requests is measured on its own"
    chosen.start_version()
    observe(chosen, match, [8, 8, 8], [1, 2, 3, 7], 60)
    assert prefers(), "the acceptance of the version before is forgotten"


def test_a_shorter_row_is_compared_with_as_many_tokens_of_the_speculator() -> None:
    chosen, chain = planner(), SuffixChain((1,), ((0.6, 4),), (0.6,))
    for _ in range(60):  # half of the speculator's first tokens are right, and all behind these
        chosen.observe(chain, [1, 2, 3], [1, 2, 3, 7], greedy=True, weight=1.0)
        chosen.observe(chain, [9, 2, 3], [1, 8], greedy=True, weight=1.0)
    assert not chosen.prefers(chain, 3, greedy=True)
    assert chosen.prefers(chain, 1, greedy=True)


def test_a_suffix_chain_that_is_not_verified_is_measured_as_far_as_the_output_goes() -> None:
    # The second token belongs to another group of match lengths than the first.
    chosen, match = planner(), Match(5, [[1, 2, 3]])
    before = chosen.chain(match, greedy=True).chances
    observe(chosen, match, [9, 9, 9], [1, 8], 100)
    first, second, third = chosen.chain(match, greedy=True).chances
    assert first > 0.9 > before[0]
    assert second < 0.1
    assert third <= second


@pytest.mark.parametrize("verified", ["speculator", "suffix"])
def test_the_expected_tokens_of_a_chain_do_not_depend_on_which_chain_was_verified(verified: str) -> None:
    draw, rate, right = random.Random(1), 0.8, 0.3
    model, depth = ChainModel(3), 3
    total, steps = 0.0, 4000
    for step in range(steps):
        truth = [0, 1, 2, 3]
        speculator = [token if draw.random() < rate else 99 for token in truth[:depth]]
        suffix = [token if draw.random() < right else 99 for token in truth[:depth]]
        row = speculator if verified == "speculator" else suffix
        accepted = next((i for i, token in enumerate(row) if token != truth[i]), depth)
        model.update(0.6, speculator, truth[: accepted + 1], weight=0.3)
        total += model.expect(0.6, depth) if step >= steps // 2 else 0.0
    expected = rate + rate**2 + rate**3
    assert total / (steps // 2) == pytest.approx(expected, abs=0.2)


def test_tokens_behind_a_mismatch_say_nothing_of_their_depth() -> None:
    model = ChainModel(2)
    for _ in range(200):
        model.update(0.6, [99, 2], [1, 2], weight=1.0)
        model.update(0.6, [1, 99], [1, 2], weight=1.0)
    assert model.expect(0.6, 2) == pytest.approx(0.5, abs=0.05)
