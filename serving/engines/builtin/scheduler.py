"""Which sequences run, which of them may draft, and what each feeds to the target's forward.

The scheduler decides and computes nothing: it holds the waiting queue and the slots.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Collection, Mapping
from typing import NamedTuple

from serving.engines.base import EngineFullError
from serving.engines.builtin.drafter import EMPTY_TREE, DraftTree
from serving.engines.builtin.prefix_cache import BLOCK_TOKENS
from serving.engines.builtin.sequence import Sequence
from serving.planner.planner import Planner

MAX_PREFILL_TOKENS = 128
"""Maximum number of prompt tokens that one verify step reads, over all sequences."""


class ScheduledSequence(NamedTuple):
    """The tokens that one sequence feeds to the target's forward: a piece of its prompt, or the root and a draft."""

    sequence: Sequence
    tokens: list[int]
    tree: DraftTree

    @property
    def logit_rows(self) -> int:
        """Number of trailing tokens after which the target chooses a token: in prefill only the prompt's last one."""
        seq = self.sequence
        if seq.is_prefilling:
            return int(seq.num_cached_tokens + len(self.tokens) == len(seq.request.prompt))
        return len(self.tokens)


class Scheduler:
    """Owns the waiting queue and the slots. Not thread-safe.

    Args:
        max_num_seqs: Number of slots.
        max_waiting: Maximum length of the waiting queue.
        planner: Knows the prefill budget of a verify step.
    """

    def __init__(self, max_num_seqs: int, max_waiting: int, planner: Planner) -> None:
        self._max_waiting, self._planner = max_waiting, planner
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs))
        """A heap: the lowest slot goes first, because a CUDA graph spans all slots up to the last one in use."""

    def add(self, seq: Sequence) -> None:
        """Append a sequence to the waiting queue.

        Raises:
            EngineFullError: the queue is full.
        """
        if len(self.waiting) >= self._max_waiting:
            raise EngineFullError(f"{len(self.waiting)} requests wait already (serve.max_waiting_requests)")
        self.waiting.append(seq)

    def admit(self) -> None:
        """Move waiting sequences into free slots."""
        while self.waiting and self._free_slots:
            seq = self.waiting.popleft()
            seq.slot = heapq.heappop(self._free_slots)
            seq.queue_s = time.monotonic() - seq.submitted
            self.running.append(seq)

    def cancel_waiting(self, request_ids: Collection[str]) -> list[Sequence]:
        """Remove the sequences of the given requests from the waiting queue and return them."""
        cancelled = [seq for seq in self.waiting if seq.request.id in request_ids]
        if cancelled:
            self.waiting = deque(seq for seq in self.waiting if seq.request.id not in request_ids)
        return cancelled

    def release(self, seq: Sequence) -> None:
        """Free the slot of a running sequence."""
        self.running.remove(seq)
        heapq.heappush(self._free_slots, seq.slot)

    @property
    def decoding(self) -> list[Sequence]:
        """Running sequences past their prefill."""
        return [seq for seq in self.running if not seq.is_prefilling]

    def schedule_drafts(self) -> list[Sequence]:
        """Return the sequences that may draft in the next verify step."""
        return [seq for seq in self.decoding if seq.request.speculate and seq.room > 1]

    def schedule(self, trees: Mapping[int, DraftTree], catch_up: int = 0) -> list[ScheduledSequence]:
        """Return what each running sequence feeds to the target's forward.

        A decoding sequence feeds its root, the last token, and its draft tree. A prefilling sequence feeds a piece of
        its prompt as far as the step's prefill budget reaches, so that a long prompt does not hold up the others. A
        sequence whose prompt begins like that of an earlier one waits until it can take the common blocks from the
        prefix cache.

        Args:
            trees: Draft trees by slot.
            catch_up: Tokens that the speculator caught up with in this verify step.
        """
        decode_rows = len(self.decoding) + sum(len(tree.nodes) for tree in trees.values())
        budget = MAX_PREFILL_TOKENS
        if decode_rows:
            budget = self._planner.limit_prompt_rows(
                decode_rows=decode_rows, max_rows=MAX_PREFILL_TOKENS, catch_up=catch_up
            )
        scheduled = []
        reading: list[Sequence] = []
        for seq in self.running:
            if not seq.is_prefilling:
                tree = trees.get(seq.slot, EMPTY_TREE)
                scheduled.append(ScheduledSequence(seq, [seq.tokens[-1], *tree.tokens], tree))
            elif budget and not any(seq.waits_for(other, BLOCK_TOKENS) for other in reading):
                reading.append(seq)
                piece = list(seq.request.prompt[seq.num_cached_tokens : seq.num_cached_tokens + budget])
                budget -= len(piece)
                scheduled.append(ScheduledSequence(seq, piece, EMPTY_TREE))
        return scheduled
