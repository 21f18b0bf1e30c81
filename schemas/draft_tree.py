"""The shape of a draft: nodes with parent links, of which a chain is the case without branches.

``parents[i]`` is the index of node i's parent, or ``ROOT``; a node stands after its parent. m: drafted nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from schemas.trace.record import ROOT


def chain(length: int) -> tuple[int, ...]:
    """Parents of a draft without branches."""
    return tuple(range(ROOT, length - 1))


def is_chain(parents: Sequence[int]) -> bool:
    """Whether every node follows the one before it."""
    return tuple(parents) == chain(len(parents))


def depths(parents: Sequence[int]) -> list[int]:
    """[m] how many tokens after the root each node stands; a child of the root has depth 1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent == ROOT else found[parent] + 1)
    return found


def visible(parents: Sequence[int]) -> npt.NDArray[np.bool_]:
    """[m, m] what each node attends to among the drafted: row i is true at i and at its ancestors."""
    seen = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            seen[node] |= seen[parent]
    return seen


def rejected_branches(parents: Sequence[int], accepted: Sequence[int]) -> list[tuple[int, ...]]:
    """Paths of drafted nodes, root's child to leaf, that end outside the accepted path.

    A chain has at most one. A path that was accepted whole is not among them.
    """
    inner, kept = set(parents), set(accepted)
    paths = []
    for leaf in range(len(parents)):
        if leaf in inner or leaf in kept:
            continue
        path, node = [leaf], parents[leaf]
        while node != ROOT:
            path.append(node)
            node = parents[node]
        paths.append(tuple(reversed(path)))
    return paths
