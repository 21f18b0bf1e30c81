"""Draft trees, and how the drafts of two drafters become one tree.

Shape suffixes: m nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from schemas.trace.record import ROOT, DraftSource


class DraftNode(NamedTuple):
    """A draft token."""

    token: int
    parent: int
    """Index of the node before it, or ``ROOT``."""
    depth: int
    logprob: float
    """Under the drafter's distribution of the next token, before temperature."""
    confidence: float
    """The drafter's own estimate that the target chooses the token after its accepted parent."""
    chance: float
    """Measured probability that the target accepts the token and its ancestors."""
    source: DraftSource = DraftSource.SPECULATOR
    """The drafters that proposed it."""
    match_length: int = 0
    """Number of tokens before it that the suffix drafter found before the same token elsewhere."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Draft tokens for the target to verify. Every node follows its parent; a chain is a tree without branches."""

    nodes: tuple[DraftNode, ...] = ()
    version: str = ""
    """Speculator version that drafted at least one node, empty if none did."""

    @property
    def tokens(self) -> list[int]:
        """[m] token ids."""
        return [node.token for node in self.nodes]

    @property
    def parents(self) -> list[int]:
        """[m] parent links."""
        return [node.parent for node in self.nodes]

    @property
    def needs_sources(self) -> bool:
        """Whether another source than the speculator alone proposed a node."""
        return any(node.source != DraftSource.SPECULATOR for node in self.nodes)

    def path_to(self, node: int) -> list[int]:
        """Return the tokens from the root's child to a node; none for ``ROOT``."""
        path: list[int] = []
        while node != ROOT:
            path.append(self.nodes[node].token)
            node = self.nodes[node].parent
        return path[::-1]

    def keep(self, kept: Seq[int]) -> DraftTree:
        """Return the tree of the nodes with the given ascending indices, which include their ancestors."""
        index = {ROOT: ROOT} | {node: i for i, node in enumerate(kept)}
        nodes = tuple(self.nodes[node]._replace(parent=index[self.nodes[node].parent]) for node in kept)
        return self.with_nodes(nodes)

    def with_nodes(self, nodes: tuple[DraftNode, ...]) -> DraftTree:
        """Return a tree of some of this tree's nodes and of others; it has a version if the speculator drafted one."""
        from_speculator = any(node.source & DraftSource.SPECULATOR for node in nodes)
        return DraftTree(nodes, self.version if from_speculator else "")

    def follow(self, tokens: Seq[int]) -> list[int]:
        """Return the path of nodes, from the root's child on, whose tokens begin ``tokens``."""
        path: list[int] = []
        for node, (token, parent, *_) in enumerate(self.nodes):
            if len(path) < len(tokens) and token == tokens[len(path)] and parent == (path[-1] if path else ROOT):
                path.append(node)
        return path


EMPTY_TREE = DraftTree()

_MAX_TOTAL = 0.99
"""Rates of siblings are measured one by one and may sum to more than 1."""


def merge_trees(first: DraftTree, second: DraftTree) -> DraftTree:
    """Return one tree with the nodes of both. A token that both propose after the same tokens is one node.

    Nodes of ``first`` keep their indices.

    The drafters are taken to err independently of each other. Where they agree, the token is wrong only if both err.
    Where they disagree, at most one is right: one with rate p is right with probability p (1 - q) / (1 - p q) if the
    rate of the other is q. Measured rates follow both formulas (docs/explanation/acceptance.md).
    """
    if not first.nodes or not second.nodes:
        return first if first.nodes else second
    nodes, index = list(first.nodes), {ROOT: ROOT}
    rates, second_rates = _acceptance_rates(first), _acceptance_rates(second)
    by_place = {(node.parent, node.token): i for i, node in enumerate(nodes)}
    agreed = set()
    for i, node in enumerate(second.nodes):
        place = (index[node.parent], node.token)
        if place in by_place:
            index[i] = by_place[place]
            agreed.add(index[i])
            nodes[index[i]] = nodes[index[i]]._replace(source=nodes[index[i]].source | node.source)
        else:
            index[i] = by_place[place] = len(nodes)
            nodes.append(node._replace(parent=place[0]))
    totals = _sum_by_parent(zip((node.parent for node in first.nodes), rates, strict=True))
    second_totals = _sum_by_parent(zip((index[node.parent] for node in second.nodes), second_rates, strict=True))
    for i, rate in zip(index.values(), (0.0, *second_rates), strict=True):
        if i in agreed:
            rates[i] += rate * (1 - rates[i])
        elif i != ROOT:
            rates.append(rate)
    for i, node in enumerate(nodes):
        above = 1.0 if node.parent == ROOT else nodes[node.parent].chance
        if i not in agreed:
            p, q = (min(each.get(node.parent, 0.0), _MAX_TOTAL) for each in (totals, second_totals))
            rates[i] *= (1 - (q if i < len(first.nodes) else p)) / (1 - p * q)
        nodes[i] = node._replace(chance=above * rates[i])
    return DraftTree(tuple(nodes), first.version or second.version)


def _acceptance_rates(tree: DraftTree) -> list[float]:
    """Return [m] the acceptance probability of each node after its accepted parent."""
    chances = [node.chance for node in tree.nodes]
    return [
        chance / max(1.0 if node.parent == ROOT else chances[node.parent], 1e-9)
        for node, chance in zip(tree.nodes, chances, strict=True)
    ]


def _sum_by_parent(rates: Iterable[tuple[int, float]]) -> dict[int, float]:
    totals: dict[int, float] = {}
    for parent, rate in rates:
        totals[parent] = totals.get(parent, 0.0) + rate
    return totals
