"""The suffix drafter: continues the longest match of a sequence's end in the sequence itself and in earlier answers.

It needs no draft network and no training, and drafts any token of the target's vocabulary. Drafts are chains.
"""

from __future__ import annotations

import math

from serving.engines.builtin.drafter import DraftNode, DraftTree
from serving.engines.builtin.scoped_corpus import ScopedCorpus
from serving.engines.builtin.sequence import Sequence
from serving.engines.builtin.suffix_corpus import MAX_MATCH, Match, SequenceHistory, choose_longest, likeliest_chain
from serving.planner import DraftBudget, ForwardTiming


class SuffixDrafter:
    """Implements ``Drafter`` without a network.

    Args:
        corpus: The earlier answers.
    """

    def __init__(self, corpus: ScopedCorpus) -> None:
        self._corpus = corpus
        self._histories: dict[int, SequenceHistory] = {}
        """History of each running sequence, by slot."""

    def draft(self, sequences: list[Sequence], budget: DraftBudget) -> tuple[list[DraftTree], list[ForwardTiming]]:
        """Draft one chain per sequence. There are no timings, because no forward runs."""
        return [self._draft_chain(seq, budget) for seq in sequences], []

    def finish(self, sequence: Sequence) -> None:
        """Add the answer of a sequence that may be traced to the corpus, after the last tokens of its prompt."""
        request = sequence.request
        if request.trace:
            self._corpus.insert(request.label, sequence.tokens[max(len(request.prompt) - MAX_MATCH, 0) :])

    def _draft_chain(self, seq: Sequence, budget: DraftBudget) -> DraftTree:
        """Draft until a token is not worth a row of the target's forward; that token is in ``pruned``."""
        # The bonus token takes the last place of the output.
        depth = min(budget.depth, seq.room - 1)
        acceptance = budget.acceptance[seq.is_greedy]
        nodes: list[DraftNode] = []
        chance = 1.0
        for token, probability in likeliest_chain(self._find_match(seq, depth).continuations):
            node = DraftNode(token, len(nodes) - 1, len(nodes) + 1, math.log(probability))
            chance *= acceptance.estimate_for(probability)
            if chance < budget.verify_threshold:
                return DraftTree(tuple(nodes), pruned=(node,))
            nodes.append(node)
        return DraftTree(tuple(nodes))

    def _find_match(self, seq: Sequence, depth: int) -> Match:
        """Return the longest match in the sequence itself and in earlier answers."""
        if not seq.num_draft_cached_tokens:
            self._histories[seq.slot] = SequenceHistory()
        seq.num_draft_cached_tokens = len(seq.tokens)
        own = self._histories[seq.slot].find(seq.tokens, depth)
        return choose_longest(own, self._corpus.find(seq.request.label, seq.tokens[-MAX_MATCH:], depth))
