"""The own draft of a version is what the version would have drafted and had accepted alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.batches import TRACES
from schemas.draft_tree import chain, depths
from schemas.speculator.acceptance import accept
from schemas.trace.own_draft import COLUMNS, find_own_drafts
from schemas.trace.record import ROOT, DraftSource

SPEC, SUFFIX, BOTH = (int(source) for source in (DraftSource.SPECULATOR, DraftSource.SUFFIX, sum(DraftSource)))


@dataclass(frozen=True)
class Drafted:
    parents: tuple[int, ...]
    sources: tuple[int, ...] | None
    accepted: tuple[int, ...] = ()
    speculator: str = "1"


def figures(*steps: Drafted) -> list[tuple[int, int, int, bool]]:
    """Return draft tokens, depth, accepted tokens and whether the first one was accepted, of each step."""
    columns = {
        "speculator": [step.speculator for step in steps],
        "draft_parents": [step.parents for step in steps],
        "accepted": [step.accepted for step in steps],
        "draft_sources": [step.sources for step in steps],
    }
    schema = pa.schema([TRACES.field(name) for name in COLUMNS])
    own = find_own_drafts(pa.table([pa.array(columns[name], schema.field(name).type) for name in COLUMNS], schema))
    return [tuple(row) for row in zip(*(figure.tolist() for figure in own), strict=True)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("drafted", "expected"),
    [
        pytest.param(Drafted(chain(3), None, (0, 1)), (3, 3, 2, True), id="all from the version"),
        pytest.param(Drafted(chain(3), (SPEC,) * 3, (0, 1)), (3, 3, 2, True), id="all from the version, named"),
        pytest.param(Drafted(chain(3), (SUFFIX,) * 3, (0, 1), ""), (0, 0, 0, False), id="all from the suffix drafter"),
        pytest.param(Drafted((), None, (), ""), (0, 0, 0, False), id="no draft"),
        pytest.param(Drafted(chain(3), None, (0,), ""), (0, 0, 0, False), id="of an unknown version"),
        pytest.param(
            Drafted(chain(3), (BOTH, SPEC, SUFFIX), (0, 1, 2)), (2, 2, 2, True), id="suffix after the version"
        ),
        pytest.param(Drafted(chain(3), (SUFFIX, SPEC, BOTH), (0, 1, 2)), (0, 0, 0, False), id="version after suffix"),
        pytest.param(
            Drafted((ROOT, ROOT, 1), (SUFFIX, SPEC, SPEC), (0,)),
            (2, 2, 0, False),
            id="another token of suffix accepted",
        ),
        pytest.param(
            Drafted((ROOT, ROOT, 1), (SUFFIX, SPEC, BOTH), (1, 2)),
            (2, 2, 2, True),
            id="version after a rejected suffix",
        ),
        pytest.param(Drafted((ROOT, ROOT), (SPEC, SPEC), (1,)), (2, 1, 1, False), id="second of the version accepted"),
    ],
)
def test_tokens_count_as_far_as_the_version_proposed_the_path(
    drafted: Drafted, expected: tuple[int, int, int, bool]
) -> None:
    assert figures(drafted) == [expected]


@st.composite
def greedy_steps(draw: st.DrawFn) -> tuple[list[int], list[int], tuple[int, ...], list[int]]:
    """Return tokens, parents, sources of a merged draft, and the target's choice after the root and each node."""
    nodes = draw(st.integers(0, 8))
    parents = [draw(st.integers(ROOT, node - 1)) for node in range(nodes)]
    # Siblings differ: a token that both propose is one node.
    tokens = [sum(parent == other for other in parents[:node]) for node, parent in enumerate(parents)]
    sources = tuple(draw(st.sampled_from([SPEC, SUFFIX, BOTH])) for _ in range(nodes))
    return tokens, parents, sources, [draw(st.integers(0, 2)) for _ in range(nodes + 1)]


def closed(parents: Sequence[int], sources: Sequence[int]) -> list[int]:
    """Return the nodes that a drafter alone would have proposed, for SPEC."""
    kept: list[int] = []
    for node, parent in enumerate(parents):
        if sources[node] & SPEC and (parent == ROOT or parent in kept):
            kept.append(node)
    return kept


@given(st.lists(greedy_steps(), max_size=5))
def test_the_greedy_figures_are_those_of_the_versions_tree_alone(
    steps: list[tuple[list[int], list[int], tuple[int, ...], list[int]]],
) -> None:
    merged, expected = [], []
    for tokens, parents, sources, chosen in steps:
        accepted = accept(tokens, parents, chosen).path
        merged.append(Drafted(tuple(parents), sources, tuple(accepted), "1" if any(s & SPEC for s in sources) else ""))
        kept = closed(parents, sources)
        place = {node: index for index, node in enumerate([ROOT, *kept], start=-1)}
        own_parents = [place[parents[node]] for node in kept]
        alone = accept([tokens[n] for n in kept], own_parents, [chosen[0], *(chosen[1 + n] for n in kept)]).path
        expected.append((len(kept), max(depths(own_parents), default=0), len(alone), alone[:1] == (0,)))
    assert figures(*merged) == expected
