"""Draft trees, and how the drafts of two drafters become one tree.

Shape suffixes: m nodes of a tree, V vocabulary of the target.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from schemas.trace.record import ROOT, DraftSource


class DraftNode(NamedTuple):
    """A draft token."""

    token: int
    parent: int
    """Index of the node before it, or ``ROOT``."""
    depth: int
    logprob: float
    """Under the distribution it was sampled from; for a token chosen without sampling, the drafter's own estimate."""
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
    probs: tuple[Tensor | None, ...] = ()
    """[m] distribution [V] that each token was sampled from, None for a token that was not; empty if none was."""
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
    def has_suffix(self) -> bool:
        """Whether the suffix drafter proposed a node."""
        return any(node.source & DraftSource.SUFFIX for node in self.nodes)

    def is_sampled(self, node: int) -> bool:
        """Return whether a node's token was sampled: it is verified, whatever it is."""
        return bool(self.probs) and self.probs[node] is not None

    def keep(self, kept: Seq[int]) -> DraftTree:
        """Return the tree of the nodes with the given ascending indices, which include their ancestors."""
        index = {ROOT: ROOT} | {node: i for i, node in enumerate(kept)}
        nodes = tuple(self.nodes[node]._replace(parent=index[self.nodes[node].parent]) for node in kept)
        probs = tuple(self.probs[node] for node in kept) if self.probs else ()
        from_speculator = any(node.source & DraftSource.SPECULATOR for node in nodes)
        return DraftTree(nodes, probs, self.version if from_speculator else "")

    def follow(self, tokens: Seq[int]) -> list[int]:
        """Return the path of nodes, from the root's child on, whose tokens begin ``tokens``."""
        path: list[int] = []
        for node, (token, parent, *_) in enumerate(self.nodes):
            if len(path) < len(tokens) and token == tokens[len(path)] and parent == (path[-1] if path else ROOT):
                path.append(node)
        return path


EMPTY_TREE = DraftTree()


def merge_trees(first: DraftTree, second: DraftTree) -> DraftTree:
    """Return one tree with the nodes of both. A token that both propose after the same tokens is one node.

    Nodes of ``first`` keep their indices. The target tests siblings in order, so a sampled token is tested before a
    token that ``second`` chose, which is not sampled. Two drafters that agree are wrong only if both are: the chance of
    a common node is taken as if they erred independently. Where they disagree, at most one is right.
    """
    if not first.nodes or not second.nodes:
        return first if first.nodes else second
    nodes, index = list(first.nodes), {ROOT: ROOT}
    by_place = {(node.parent, node.token): i for i, node in enumerate(nodes)}
    for i, node in enumerate(second.nodes):
        parent = index[node.parent]
        place = (parent, node.token)
        if place in by_place:
            index[i] = by_place[place]
            found = nodes[index[i]]
            chance = found.chance + node.chance - found.chance * node.chance
            nodes[index[i]] = found._replace(source=found.source | node.source, chance=chance)
        else:
            index[i] = by_place[place] = len(nodes)
            nodes.append(node._replace(parent=parent))
    probs = (*first.probs, *(None for _ in range(len(nodes) - len(first.nodes)))) if first.probs else ()
    return DraftTree(tuple(nodes), probs, first.version or second.version)
