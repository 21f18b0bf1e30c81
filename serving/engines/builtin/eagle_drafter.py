"""The EAGLE-3 drafter: a draft network with its own KV cache.

Row t of the draft pairs the target's features after token t with the embedding of token t + 1, at rotary position t.
It reads as much of a long prompt as it was trained to attend to (``schemas.speculator.draft_context``); its positions
begin with the first row that it reads, which changes nothing because rotary attention depends on their differences.
Committed rows are computed once, from the target's features, and stay in the cache. The rows of draft tokens follow
them in the same slot, computed from the draft's own hidden states; the next verify step overwrites them.

A draft is a tree that grows where the draft is confident (EAGLE-2, Li et al., arXiv 2406.16858, section 4): each draft
step extends the most promising nodes of the step before, as many as the width, and only the tokens that are worth a row
of the target's forward are verified. With width 1 it is a chain of the draft's likeliest tokens for a greedy request,
and of the tokens that the request's noise chooses from the draft's distribution for a sampled one. Other choices stand
beside its tokens where they are worth a row: they take no draft step.

Shape suffixes: B sequences, F frontier nodes of all trees (features after ``features_``), w width, T rows, H hidden
size, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from schemas.draft_tree import attention_mask
from schemas.speculator.acceptance import sampling_probs
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from schemas.trace.record import ROOT
from serving.engines.base import Request
from serving.engines.builtin.chain_rows import ChainRows
from serving.engines.builtin.cuda_graphs import CudaGraphRunner
from serving.engines.builtin.drafter import DraftNode, DraftTree
from serving.engines.builtin.kernels import WeightDtype, topk
from serving.engines.builtin.kv_cache import BatchLayout, KVCache, RaggedBatch, Segment, TreeLayout
from serving.engines.builtin.noise import exponential_noise
from serving.engines.builtin.packed_draft import PackedDraft
from serving.engines.builtin.sequence import Sequence
from serving.planner.acceptance_model import AcceptanceModel
from serving.planner.latency_model import ForwardTiming
from serving.planner.planner import DraftBudget

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_CANDIDATES = 64
"""Likeliest tokens of the draft among which a sampled request's noise chooses."""
_MAX_SIBLINGS = 3
"""Tokens drafted after one node, unless the width is larger."""


class EagleDrafter:
    """Drafts with an EAGLE-3 draft. The draft shares the target's embeddings.

    Args:
        draft: The network, on a CPU; the drafter uses a packed copy.
        version: Speculator version of the network.
        embeddings_VH: The target's embeddings.
        slots: Maximum number of sequences.
        positions: Maximum length of a sequence with its draft.
        width: Nodes that a draft step extends; 1 drafts chains.
        depth: Maximum depth of a draft.
        weight_dtype: Weight dtype of the packed copies; None chooses the fastest.
    """

    def __init__(
        self,
        draft: EagleDraft,
        version: str,
        embeddings_VH: Tensor,
        slots: int,
        positions: int,
        *,
        width: int = 1,
        depth: int = 16,
        weight_dtype: WeightDtype | None = None,
    ) -> None:
        shape = draft.shape
        self._activate(version)
        self._device = embeddings_VH.device
        self._embeddings_VH = embeddings_VH
        self._width = width
        self.positions = positions
        """Maximum length of a sequence with its draft."""
        entries = positions + (width * depth if width > 1 else 0)
        self._pack = partial(PackedDraft, positions=entries, device=self._device, dtype=weight_dtype)
        self._packed: WeakKeyDictionary[EagleDraft, PackedDraft] = WeakKeyDictionary()
        self._network = self._pack(draft)
        self._cache = KVCache(1, slots, shape.num_key_value_heads, entries, shape.head_dim, self._device)
        self._graphs = CudaGraphRunner(self._forward, self._cache) if self._device.type == "cuda" else None

    def draft(
        self, sequences: list[Sequence], budget: DraftBudget, acceptance: Mapping[bool, AcceptanceModel]
    ) -> tuple[list[DraftTree], list[ForwardTiming]]:
        """Draft one tree per sequence, and mark the sequences' features as seen.

        Args:
            sequences: Sequences past their prefill with room for two output tokens or more.
            budget: How deep to draft, and which acceptance probability pays for a token.
            acceptance: Measured acceptance of earlier drafts, of greedy sequences (True) and of sampled ones (False).

        Returns:
            The trees with all drafted nodes, and the duration of each draft step.
        """
        by_slot = sorted(sequences, key=lambda seq: seq.slot)
        trees = [_GrowingTree(seq, budget, acceptance[seq.is_greedy]) for seq in by_slot]
        started = time.perf_counter()
        hidden_FH = self._consume_committed(by_slot)
        timings, growing = [], trees
        for depth in range(1, budget.depth + 1):
            drafting = len(growing)
            self._extend(growing, hidden_FH)
            growing = [tree for tree in growing if tree.pays_at(depth + 1)]
            if growing:
                hidden_FH = self._consume_frontiers(growing, hidden_FH)
            now = time.perf_counter()
            timings.append(ForwardTiming(drafting, drafting, now - started))
            started = now
            if not growing:
                break
        drafts = {tree.seq.slot: DraftTree(tuple(tree.nodes), self.version) for tree in trees}
        return [drafts[seq.slot] for seq in sequences], timings

    def read(self, seq: Sequence, count: int) -> None:
        """Read the next ``count`` committed tokens of a sequence, of which it has more, without drafting."""
        tokens_T, hidden_TH, batch = self._take_committed({seq: count})
        if self._graphs:
            self._run_forward(tokens_T, hidden_TH, batch)
        else:
            _, k_TME, v_TME = self._network.project(self._embeddings_VH[tokens_T], hidden_TH, batch.positions_T)
            self._cache.write(0, batch, k_TME, v_TME)

    def pack(self, draft: EagleDraft) -> PackedDraft:
        """Return a packed copy of the given weights, the same one as long as the caller keeps them.

        Raises:
            CheckpointError: the weights have another shape.
        """
        if draft.shape != self._network.shape:
            raise CheckpointError("the draft's shape is not that of this node's line")
        if draft not in self._packed:
            self._packed[draft] = self._pack(draft)
        return self._packed[draft]

    def check(self, draft: EagleDraft) -> None:
        """Run a smoke draft with the given weights over made-up features.

        Raises:
            CheckpointError: the weights have another shape, or produce values that are not finite.
        """
        network, rows = self.pack(draft), 8
        generator = torch.Generator().manual_seed(0)
        features_TF = torch.randn(rows, draft.shape.feature_width, generator=generator).to(self._device)
        with torch.inference_mode():
            tokens_T = torch.arange(rows, device=self._device)
            hidden_TH = network.fuse(features_TF)
            q_TNE, k_TME, v_TME = network.project(self._embeddings_VH[tokens_T], hidden_TH, tokens_T)
            cache = KVCache(1, 1, k_TME.shape[1], rows, k_TME.shape[2], self._device)
            attended_TNE = cache.attend(0, RaggedBatch([Segment(0, 0, rows)], self._device), q_TNE, k_TME, v_TME)
            finite = torch.isfinite(network.logits(network.finish(hidden_TH, attended_TNE))).all()
        if not finite:
            raise CheckpointError("smoke draft: scores are not finite")

    def swap(self, packed: PackedDraft, version: str) -> None:
        """Draft with other weights (``pack``). Running sequences keep the keys of the weights before."""
        if self._graphs:
            self._network.load_state_dict(packed.state_dict())
        else:
            self._network = packed
        self._activate(version)

    def _activate(self, version: str) -> None:
        self.version = version
        self.active_since_us = time.time_ns() // 1000
        """Unix time in microseconds from which the version drafts."""

    def clear_cache(self) -> None:
        """Forget the keys and values of all sequences."""
        self._cache.clear(slice(None))

    def _consume_committed(self, sequences: list[Sequence]) -> Tensor:
        """Run the rows the draft has not seen; return the hidden states [B, H] after each sequence's last one."""
        network = self._network
        counts = {seq: len(seq.tokens) - 1 - seq.num_draft_seen_tokens for seq in sequences}
        tokens_T, hidden_TH, batch = self._take_committed(counts)
        if self._graphs:
            return self._run_forward(tokens_T, hidden_TH, batch)[batch.last_rows]
        # Only the last row of each sequence needs a hidden state; the rows before leave just their keys and values.
        q_TNE, k_TME, v_TME = network.project(self._embeddings_VH[tokens_T], hidden_TH, batch.positions_T)
        self._cache.write(0, batch, k_TME, v_TME)
        last = batch.last_rows
        ends = ChainRows([(seq.slot, seq.num_draft_cached_tokens - 1) for seq in sequences])
        return network.finish(hidden_TH[last], self._cache.read(0, ends, q_TNE[last]))

    def _take_committed(self, counts: Mapping[Sequence, int]) -> tuple[Tensor, Tensor, RaggedBatch]:
        """Return tokens, hidden states [T, H] and places of so many rows of each sequence, and mark them as seen."""
        tokens, features, segments = [], [], []
        for seq, count in counts.items():
            seen = seq.num_draft_seen_tokens
            tokens += seq.tokens[seen + 1 : seen + 1 + count]
            features += seq.take_features(count)
            segments.append(Segment(seq.slot, seq.num_draft_cached_tokens, count))
            seq.num_draft_cached_tokens += count
        tokens_T = torch.tensor(tokens, device=self._device)
        return tokens_T, self._network.fuse(torch.cat(features)), RaggedBatch(segments, self._device)

    def _consume_frontiers(self, trees: list[_GrowingTree], hidden_FH: Tensor) -> Tensor:
        """Run the frontier nodes of all trees; return the hidden states [F, H] after them."""
        batch: RaggedBatch | ChainRows
        if self._graphs or self._width > 1:
            batch = RaggedBatch([tree.segment() for tree in trees], self._device)
        else:
            batch = ChainRows([(tree.seq.slot, tree.seq.num_draft_cached_tokens + len(tree.cached)) for tree in trees])
        tokens_F = torch.tensor(
            [tree.nodes[node].token for tree in trees for node in tree.frontier], device=self._device
        )
        hidden_FH = hidden_FH[[row for tree in trees for row in tree.source_rows]]
        for tree in trees:
            tree.cached += tree.frontier
        return self._run_forward(tokens_F, hidden_FH, batch)

    def _extend(self, trees: list[_GrowingTree], hidden_FH: Tensor) -> None:
        """Draft the children of every frontier node; the most promising children become the frontier."""
        logprobs_FD = self._network.logits(hidden_FH).log_softmax(dim=-1)
        greedy, count = all(tree.seq.is_greedy for tree in trees), max(self._width, _MAX_SIBLINGS)
        best = topk(logprobs_FD, min(count if greedy else _CANDIDATES, logprobs_FD.shape[-1]))
        logprobs_Fk = best.scores_Rk.cpu().numpy()
        tokens_Fk = self._network.target_ids_D[best.ids_Rk].cpu().numpy()
        row = 0
        for tree in trees:
            added: list[tuple[float, int, int]] = []
            for parent in tree.frontier:
                ranked = tree.rank_children(parent, logprobs_Fk[row], tokens_Fk[row], count)
                for rank, (child, confidence) in enumerate(ranked):
                    if rank >= self._width and tree.estimate(parent, confidence) < tree.budget.sibling_threshold:
                        break
                    token, logprob = int(tokens_Fk[row, child]), float(logprobs_Fk[row, child])
                    node = tree.add(token, parent, logprob, confidence)
                    added.append((-tree.nodes[node].chance, node, row))
                row += 1
            tree.advance(sorted(added)[: self._width])

    def _run_forward(self, tokens_T: Tensor, hidden_TH: Tensor, batch: RaggedBatch | ChainRows) -> Tensor:
        """Return the hidden states [T, H] after the given tokens and hidden states; use a CUDA graph where possible."""
        graphs = self._graphs
        outputs = graphs.run(batch, (tokens_T, hidden_TH)) if graphs and isinstance(batch, RaggedBatch) else None
        return (outputs or self._forward((tokens_T, hidden_TH), batch))[0]

    def _forward(self, inputs: Iterable[Tensor], batch: BatchLayout) -> tuple[Tensor, ...]:
        tokens_T, hidden_TH = inputs
        projected = self._network.project(self._embeddings_VH[tokens_T], hidden_TH, batch.positions_T)
        return (self._network.finish(hidden_TH, self._cache.attend(0, batch, *projected)),)


@dataclass(slots=True)
class _GrowingTree:
    """The draft tree of one sequence while it grows."""

    seq: Sequence
    budget: DraftBudget
    acceptance: AcceptanceModel
    nodes: list[DraftNode] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    """Nodes whose rows are in the cache, in the order of their entries."""
    frontier: list[int] = field(default_factory=lambda: [ROOT])
    """Nodes that the next draft step extends."""
    source_rows: list[int] = field(default_factory=list)
    """Row of the draft step before from which each frontier node was drafted."""

    def rank_children(self, parent: int, logprobs_k: F32, tokens_k: I64, count: int) -> list[tuple[int, float]]:
        """Return the best candidates after a node that the target may choose, with the draft's confidence.

        The draft chooses as the target does: greedily, or by the same noise from its own distribution. Its confidence
        is that of a softmax over the scores that decide: ``score + temperature * noise``, which at temperature 0 are
        the scores.

        Args:
            parent: The node.
            logprobs_k: The draft's log-probabilities of the candidates, best first.
            tokens_k: The candidates' target tokens.
            count: Maximum number of candidates to return.
        """
        request = self.seq.request
        if self.seq.is_greedy:
            return list(enumerate(np.exp(logprobs_k[:count]).tolist()))
        scores_1k = torch.from_numpy(logprobs_k)[None]
        probs_k = sampling_probs(scores_1k, request.temperature, request.top_p, request.top_k, request.min_p)[0].numpy()
        noise_k = exponential_noise(self.seq.seed, len(self.seq.tokens) + self.depth_of(parent), tokens_k)
        decisive_k = logprobs_k - request.temperature * np.log(noise_k)
        decisive_k[probs_k == 0] = -np.inf
        weights_k = np.exp(decisive_k - decisive_k.max())
        confidences_k = weights_k / weights_k.sum()
        best = np.argsort(-confidences_k)[:count].tolist()
        return [(i, float(confidences_k[i])) for i in best if probs_k[i] > 0]

    def add(self, token: int, parent: int, logprob: float, confidence: float) -> int:
        """Add a node and return its index.

        Raises:
            FloatingPointError: the draft's scores are not finite.
        """
        if math.isnan(logprob):
            raise FloatingPointError("the speculator's scores are not finite")
        chance = self.estimate(parent, confidence)
        self.nodes.append(DraftNode(token, parent, self.depth_of(parent) + 1, logprob, confidence, chance))
        return len(self.nodes) - 1

    def estimate(self, parent: int, confidence: float) -> float:
        """Return the measured probability that the target accepts a token of this confidence after a node."""
        above = 1.0 if parent == ROOT else self.nodes[parent].chance
        return above * self.acceptance.estimate(confidence)

    def depth_of(self, node: int) -> int:
        """Return the depth of a node; 0 for ``ROOT``."""
        return 0 if node == ROOT else self.nodes[node].depth

    def advance(self, added: list[tuple[float, int, int]]) -> None:
        """Make the new nodes (negated chance, index, source row) the frontier, as far as they are worth a row."""
        worthy = [entry for entry in added if -entry[0] >= self.budget.verify_threshold]
        self.frontier, self.source_rows = [node for _, node, _ in worthy], [row for _, _, row in worthy]

    def pays_at(self, depth: int) -> bool:
        """Return whether another draft token at ``depth`` is worth a draft step and a row."""
        # The bonus token takes the last place of the output.
        if not self.frontier or depth > min(self.budget.depth, self.seq.room - 1):
            return False
        best = max(self.nodes[node].chance for node in self.frontier)
        return best * self.acceptance.estimate_next() >= self.budget.draft_threshold

    def segment(self) -> Segment:
        """Place the frontier's rows in the draft's cache."""
        first = self.seq.num_draft_cached_tokens
        start, length = first + len(self.cached), len(self.frontier)
        if length == 1 and len(self.cached) + 1 == self.nodes[self.frontier[0]].depth:
            return Segment(self.seq.slot, start, length)
        sees = attention_mask([node.parent for node in self.nodes])[
            np.ix_(self.frontier, [*self.cached, *self.frontier])
        ]
        positions = tuple(first + self.nodes[node].depth - 1 for node in self.frontier)
        return Segment(self.seq.slot, start, length, TreeLayout(first, sees, positions))


def synthetic_sequence(tokens: list[int], features_TF: Tensor, *, slot: int = 0, room: int = 2) -> Sequence:
    """Return a greedy sequence for calibration and checks, whose tokens but the last one have the given features."""
    request = Request("synthetic", (0,), room)
    seq = Sequence(request, lambda _: None, len(tokens) + room, 0, tokens, slot)
    seq.unseen_features.append(features_TF)
    return seq
