"""Replay the suffix drafter of a node: the serving code drafts along past requests, from the answers of that time.

A request is drafted from its own tokens and from the answers in its scope (``serve.suffix_scope``) that had ended when
it began, as far as the corpus keeps them. The corpus is empty before the first request. A node differs in two ways: it
also drafts from answers that end while a request runs, and its planner verifies fewer draft tokens where they do not
pay.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np

from schemas.settings import Settings
from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.base import Request
from serving.engines.builtin.sequence import Sequence
from serving.engines.builtin.suffix_drafter import SuffixDrafter
from serving.planner.acceptance_model import AcceptanceModel
from trainer.objective.simulated_acceptance import F64
from trainer.replay.past_requests import PastRequest


class NodeSuffixReplay:
    """Implements ``SuffixReplay`` with the serving code.

    Args:
        settings: Settings of the nodes.
        depth: Maximum number of draft tokens in a row; None for that of the nodes.
    """

    def __init__(self, settings: Settings, depth: int | None = None) -> None:
        serve = settings.serve
        self._serve, self._retention = serve, settings.kafka.retention
        self._depth = depth or (serve.draft_tree_nodes if serve.adaptive_drafting else serve.num_speculative_tokens)
        self._corpora: dict[str, ScopedCorpus] = {}
        """Corpus of each node, if nodes do not share their answers; else one."""
        self._running: list[tuple[float, int, SuffixDrafter, Sequence]] = []
        """Requests that may not have ended when the next one begins, the one that ended first at the top."""
        self._requests = 0
        self._now = 0.0
        """Recorded time in Unix seconds."""
        self.limits: Mapping[str, str | int] = {
            "scope": serve.suffix_scope,
            "depth": self._depth,
            "nodes": serve.draft_tree_nodes,
        }

    def accept(self, past: PastRequest) -> F64:
        """Return [R, K]: 1 where the draft from a root is accepted to a depth, 0 where it is not.

        Args:
            past: A request that did not begin before the one of the last call.
        """
        drafter = SuffixDrafter(self._choose_corpus(past.service.node))
        self._advance(past.service.began.timestamp())
        tokens = past.tokens_N.tolist()
        seq = _as_sequence(past, tokens[: past.prompt])
        acceptance = AcceptanceModel()
        reached_RK = np.zeros((len(tokens) - 1 - past.prompt, self._depth))
        for root in range(past.prompt, len(tokens) - 1):
            seq.tokens.append(tokens[root])
            tree = drafter.draft(
                seq, acceptance, depth=self._depth, max_nodes=self._serve.draft_tree_nodes, min_chance=0.0
            )
            following = tokens[root + 1 : root + 1 + self._depth]
            reached_RK[root - past.prompt, : len(tree.follow(following))] = 1.0
        seq.tokens.append(tokens[-1])
        self._requests += 1
        heapq.heappush(self._running, (past.service.ended.timestamp(), self._requests, drafter, seq))
        return reached_RK

    def _advance(self, now: float) -> None:
        """Move to a time: insert the answers that have ended, and forget those whose retention has."""
        while self._running and self._running[0][0] <= now:
            self._now, _, drafter, ended = heapq.heappop(self._running)
            drafter.finish(ended)
            self._update_corpora()
        self._now = now
        self._update_corpora()

    def _update_corpora(self) -> None:
        for corpus in self._corpora.values():
            corpus.update(max_tokens=0)

    def _choose_corpus(self, node: str) -> ScopedCorpus:
        name = node if self._serve.suffix_scope == "node" else ""
        if name not in self._corpora:
            self._corpora[name] = ScopedCorpus(
                self._serve.suffix_scope, self._serve.suffix_corpus_bytes, self._retention, lambda: self._now
            )
        return self._corpora[name]


def _as_sequence(past: PastRequest, prompt: list[int]) -> Sequence:
    """Return the request as the engine holds it before its first output token."""
    output_tokens = len(past.tokens_N) - past.prompt
    request = Request(past.request, tuple(prompt), output_tokens, label=past.label)
    return Sequence(request, lambda _: None, len(past.tokens_N) + 1, 0, list(prompt))
