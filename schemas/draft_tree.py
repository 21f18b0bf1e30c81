"""Shape of a draft tree: draft tokens (nodes) with parent links. A chain is a tree without branches.

``parents[i]`` is the index of node i's parent, or ``ROOT``; every node follows its parent. m: number of nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from schemas.trace.record import ROOT


def chain(length: int) -> tuple[int, ...]:
    """Return the parents of a draft without branches."""
    return tuple(range(ROOT, length - 1))


def is_chain(parents: Sequence[int]) -> bool:
    """Return whether the draft has no branches."""
    return tuple(parents) == chain(len(parents))


def depths(parents: Sequence[int]) -> list[int]:
    """Return the depth [m] of each node; a child of the root has depth 1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent == ROOT else found[parent] + 1)
    return found


def attention_mask(parents: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return the attention mask [m, m] among the nodes: row i is true at node i and its ancestors."""
    mask = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            mask[node] |= mask[parent]
    return mask


def rejected_branches(parents: Sequence[int], accepted: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the paths of nodes, from the root's child to a leaf, whose leaf is not accepted.

    A chain has at most one. A completely accepted path is not rejected.
    """
    inner_nodes, accepted_nodes = set(parents), set(accepted)
    branches = []
    for leaf in range(len(parents)):
        if leaf in inner_nodes or leaf in accepted_nodes:
            continue
        path, node = [leaf], parents[leaf]
        while node != ROOT:
            path.append(node)
            node = parents[node]
        branches.append(tuple(reversed(path)))
    return branches
