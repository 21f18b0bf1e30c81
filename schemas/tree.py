"""The shape of a draft: nodes with parent links, of which a chain is the case without branches."""

from __future__ import annotations

from collections.abc import Sequence


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
        while node >= 0:
            path.append(node)
            node = parents[node]
        paths.append(tuple(reversed(path)))
    return paths
