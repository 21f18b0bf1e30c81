"""Draft trees against every branch by itself."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from schemas.draft_tree import chain, depths
from schemas.speculator.acceptance import Verdict, accept

Path = tuple[int, ...]


class _ReadRows:
    """Choices that record which rows are read."""

    def __init__(self, choices: Sequence[int]) -> None:
        self._choices = choices
        self.read: list[int] = []

    def __getitem__(self, row: int) -> int:
        self.read.append(row)
        return self._choices[row]


def contexts_of(tokens: Sequence[int], parents: Sequence[int]) -> list[Path]:
    found: list[Path] = []
    for token, parent in zip(tokens, parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


def output_of(tokens: Sequence[int], verdict: Verdict) -> Path:
    return (*(tokens[node] for node in verdict.path), verdict.bonus)


@st.composite
def trees(draw: st.DrawFn, nodes: int, vocabulary: int, deepest: int = 99) -> tuple[list[int], list[int]]:
    m = draw(st.integers(0, nodes))
    parents = [draw(st.integers(-1, i - 1)) for i in range(m)]
    assume(max(depths(parents), default=0) <= deepest)
    return [draw(st.integers(0, vocabulary - 1)) for _ in range(m)], parents


@settings(deadline=None)
@given(trees(nodes=10, vocabulary=3), st.data())
def test_the_longest_path_that_any_branch_alone_would_accept_is_accepted(
    tree: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    tokens, parents = tree
    assume(len(set(zip(parents, tokens, strict=True))) == len(tokens))
    choices = data.draw(st.lists(st.integers(0, 2), min_size=len(tokens) + 1, max_size=len(tokens) + 1))
    rows = _ReadRows(choices)
    verdict = accept(tokens, parents, rows)
    assert rows.read == [0, *(1 + node for node in verdict.path)]
    outputs: list[Path] = [(choices[0],)]
    for leaf in range(len(tokens)):
        branch = [leaf]
        while parents[branch[0]] >= 0:
            branch.insert(0, parents[branch[0]])
        drafted = [tokens[node] for node in branch]
        alone = [choices[0], *(choices[1 + node] for node in branch)]
        outputs.append(output_of(drafted, accept(drafted, chain(len(branch)), alone)))
    assert output_of(tokens, verdict) == max(outputs, key=len)
    assert [parents[node] for node in verdict.path] == [-1, *verdict.path][: len(verdict.path)]


@settings(deadline=None)
@given(trees(nodes=10, vocabulary=2), st.data())
def test_the_output_is_the_targets_if_siblings_have_the_same_token(
    tree: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    tokens, parents = tree
    contexts = contexts_of(tokens, parents)
    choice = {context: data.draw(st.integers(0, 1)) for context in [(), *contexts]}
    out = output_of(tokens, accept(tokens, parents, [choice[context] for context in [(), *contexts]]))
    assert all(choice[out[:i]] == token for i, token in enumerate(out))
