"""The suffix drafter: continues the longest match of a sequence's end in the sequence itself and in earlier answers.

It needs no draft network and no training, and drafts any token of the target's vocabulary. Its drafts branch where
earlier continuations differ.
"""

from __future__ import annotations

import heapq
import math

from schemas.suffix_corpus import END, MAX_MATCH, Match, choose_longest
from schemas.trace.record import ROOT, DraftSource
from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.builtin.drafter import EMPTY_TREE, DraftNode, DraftTree
from serving.engines.builtin.sequence import Sequence
from serving.planner.acceptance_model import AcceptanceModel

_MAX_SIBLINGS = 3


class SuffixDrafter:
    """Drafts without a network.

    Args:
        corpus: The earlier answers.
    """

    def __init__(self, corpus: ScopedCorpus) -> None:
        self._corpus = corpus

    def draft(
        self, seq: Sequence, acceptance: AcceptanceModel, *, depth: int, max_nodes: int, min_chance: float
    ) -> DraftTree:
        """Return the likeliest continuations of a sequence with room for two output tokens or more.

        Args:
            seq: The sequence.
            acceptance: Measured acceptance of earlier drafts.
            depth: Maximum depth of the tree.
            max_nodes: Maximum number of draft tokens.
            min_chance: Acceptance probability below which a token is not continued.
        """
        # The bonus token takes the last place of the output.
        depth = min(depth, seq.room - 1)
        own = seq.history.find(seq.tokens, depth)
        match = choose_longest(own, self._corpus.find(seq.request.label, seq.tokens[-MAX_MATCH:], depth))
        return grow_tree(match, acceptance, max_nodes, min_chance) if match.length else EMPTY_TREE

    def finish(self, seq: Sequence) -> None:
        """Add the answer of a sequence that may be traced to the corpus, after the last tokens of its prompt."""
        request = seq.request
        if request.trace:
            self._corpus.insert(request.label, seq.tokens[max(len(request.prompt) - MAX_MATCH, 0) :])


def grow_tree(match: Match, acceptance: AcceptanceModel, max_nodes: int, min_chance: float) -> DraftTree:
    """Grow the tree of the continuations, the likeliest token first.

    Of n continuations that agree up to a token, k that have the same next token give it a probability of k / (n + 1):
    the target may also choose a token that followed no occurrence. Of equally likely tokens the newest goes first.
    """
    nodes: list[DraftNode] = []
    frontier: list[tuple[float, int, DraftNode, list[list[int]]]] = []
    order = 0

    def add_children(parent: int, depth: int, above: float, continuations: list[list[int]]) -> None:
        nonlocal order
        following: dict[int, list[list[int]]] = {}
        for tokens in continuations:
            if len(tokens) >= depth:
                following.setdefault(tokens[depth - 1], []).append(tokens)
        total = sum(map(len, following.values())) + 1
        for token, agreeing in sorted(following.items(), key=lambda item: -len(item[1]))[:_MAX_SIBLINGS]:
            probability, length = len(agreeing) / total, match.length + depth - 1
            chance = above * acceptance.estimate(probability, length)
            if token != END:
                logprob = math.log(probability)
                node = DraftNode(token, parent, depth, logprob, probability, chance, DraftSource.SUFFIX, length)
                heapq.heappush(frontier, (-chance, order, node, agreeing))
                order += 1

    add_children(ROOT, 1, 1.0, match.continuations)
    while frontier and len(nodes) < max_nodes:
        _, _, node, agreeing = heapq.heappop(frontier)
        nodes.append(node)
        if node.chance >= min_chance:
            add_children(len(nodes) - 1, node.depth + 1, node.chance, agreeing)
    return DraftTree(tuple(nodes))
