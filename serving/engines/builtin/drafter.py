"""The draft's side of a verify step: follow what the target committed, then propose tokens for the running requests.

Row t of the draft pairs the target's features after token t with the embedding of token t + 1 and stands at rotary
position t. Committed rows are computed from true features once and stay; the rows of proposed tokens follow them in
the same slot with the draft's own hidden states, and are overwritten when the target has decided.

With width 1 a draft is a chain: for a greedy request the draft's likeliest token after each other, for a sampled one a
token drawn from the draft's distribution. With more, it is a tree that grows where the draft is sure of itself
(EAGLE-2, Li et al., arXiv 2406.16858, section 4): each step goes on from the most promising tokens of the one before,
and in the end the tokens that are worth a row of the target's pass are verified.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from schemas.draft_tree import visible
from schemas.speculator.acceptance import draw, sampling_probs
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from schemas.trace.record import ROOT
from serving.engines.base import Request
from serving.engines.builtin.cuda_graphs import CapturedPasses
from serving.engines.builtin.kernels import likeliest, narrow, replace_linears, replace_norms
from serving.engines.builtin.kv_cache import Branching, RaggedBatch, Segment, SlotCache, Tokens
from serving.planner import Acceptance, Plan, Timing


@dataclass(frozen=True, slots=True)
class Committed:
    """Rows of one request that the draft has not seen yet, and how to draw from it."""

    slot: int
    start: int
    """Position of the first row."""
    features_TF: Tensor
    next_tokens: Sequence[int]
    """[T] the token after each row; the last one is the root of the coming verify step."""
    request: Request
    generator: torch.Generator
    room: int
    """Tokens that the answer can still take before its last."""


class Node(NamedTuple):
    """A drafted token."""

    token: int
    parent: int
    """The node before it, or ``ROOT``."""
    depth: int
    logprob: float
    """Under the distribution that it was drawn from; for a token chosen without chance the draft's softmax."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens for the target to verify, each after its parent."""

    nodes: tuple[Node, ...] = ()
    probs_mV: Tensor | None = None
    """[m, V] distributions that the tokens were drawn from, over the target's vocabulary; None without chance."""
    left_out: tuple[Node, ...] = ()
    """Tokens that were drafted and are not worth verifying."""

    @property
    def tokens(self) -> list[int]:
        """[m] token ids."""
        return [node.token for node in self.nodes]

    @property
    def parents(self) -> list[int]:
        """[m] parent links."""
        return [node.parent for node in self.nodes]


class Drafted(NamedTuple):
    """A proposal for each request, and what the steps took."""

    proposals: list[Proposal]
    timings: list[Timing]


@dataclass(slots=True)
class _Growing:
    """The draft of one request in the making."""

    committed: Committed
    rows: int
    """Committed rows in the draft's cache: entry and rotary position of the first drafted one."""
    nodes: list[Node] = field(default_factory=list)
    worth: list[float] = field(default_factory=list)
    """[m] chance that each node is accepted."""
    probs: list[Tensor] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    """Nodes whose rows are in the cache, in the order of their entries."""
    frontier: list[int] = field(default_factory=lambda: [ROOT])
    """Nodes that the next step goes on from."""
    origins: list[int] = field(default_factory=list)
    """Row of the step before that each node of the frontier was drafted from."""

    @property
    def greedy(self) -> bool:
        return self.committed.request.temperature <= 0


class Drafter:
    """A draft network with a cache of its own. The target's embeddings are shared, never copied.

    Args:
        draft: The network; a packed copy of it is used.
        embeddings_VH: The target's.
        slots: Requests at a time.
        positions: Longest request, with the draft that may follow it.
        width: Tokens that a step goes on from; 1 drafts chains.
        nodes: Tokens of one request that are verified at most.
        capture: Whether passes on a GPU are captured as graphs.
    """

    def __init__(
        self,
        draft: EagleDraft,
        embeddings_VH: Tensor,
        slots: int,
        positions: int,
        *,
        width: int = 1,
        nodes: int = 64,
        capture: bool = True,
    ) -> None:
        shape = draft.shape
        self._device = embeddings_VH.device
        self._draft = pack_draft(draft, self._device)
        self._embeddings_VH = embeddings_VH
        self._width, self._nodes = width, nodes
        rows = positions + (width * nodes if width > 1 else 0)
        self._cache = SlotCache(1, slots, shape.num_key_value_heads, rows, shape.head_dim, self._device)
        graphs = capture and self._device.type == "cuda"
        self._passes = CapturedPasses(self._pass, self._cache) if graphs else None

    def propose(self, committed: Sequence[Committed], plan: Plan, acceptance: Mapping[bool, Acceptance]) -> Drafted:
        """Tokens for each request, as many as the plan allows and what was accepted so far justifies."""
        growing = [_Growing(c, c.start + len(c.next_tokens)) for c in committed]
        started = time.perf_counter()
        hidden_FH = self._follow(committed)
        timings, alive = [], growing
        for depth in range(1, plan.depth + 1):
            rows = len(alive)
            self._extend(alive, hidden_FH, plan, acceptance)
            alive = [g for g in alive if _goes_on(g, depth, plan, acceptance)]
            if alive:
                hidden_FH = self._feed(alive, hidden_FH)
            now = time.perf_counter()
            timings.append(Timing(rows, now - started))
            started = now
            if not alive:
                break
        return Drafted([self._proposal(g, plan) for g in growing], timings)

    def check(self, draft: EagleDraft) -> None:
        """Draft a few tokens from made-up features with the given weights.

        Raises:
            CheckpointError: the weights are of another shape, or give values that are not finite.
        """
        if draft.shape != self._draft.shape or not torch.equal(draft.d2t.cpu(), self._draft.d2t.cpu()):
            raise CheckpointError("the draft's shape or vocabulary is not that of this node's line")
        rows = 8
        trial = Drafter(draft, self._embeddings_VH, slots=1, positions=2 * rows, capture=False)
        generator = torch.Generator().manual_seed(0)
        features_TF = torch.randn(rows, draft.shape.feature_width, generator=generator).to(self._device)
        request = Request("check", (0,), rows)
        with torch.inference_mode():
            hidden_TH = trial._follow([Committed(0, 0, features_TF, range(rows), request, generator, rows)])
            finite = torch.isfinite(trial._draft.logits(hidden_TH)).all()
        if not finite:
            raise CheckpointError("smoke draft: scores are not finite")

    def take(self, packed: EagleDraft) -> None:
        """Draft with other weights (``pack_draft``). Running requests keep the keys that the old ones gave."""
        if self._passes:
            self._draft.load_state_dict(packed.state_dict())
        else:
            self._draft = packed

    def _follow(self, committed: Sequence[Committed]) -> Tensor:
        """[B, H] hidden states after the last committed row of each request; the rows before only leave their keys."""
        batch = RaggedBatch([Segment(c.slot, c.start, len(c.next_tokens)) for c in committed], self._device)
        draft = self._draft
        hidden_TH = draft.fuse(torch.cat([c.features_TF for c in committed]))
        tokens_T = torch.tensor([token for c in committed for token in c.next_tokens], device=self._device)
        if self._passes:
            return self._run(tokens_T, hidden_TH, batch)[batch.last_rows]
        q, k, v = draft.project(self._embeddings_VH[tokens_T][None], hidden_TH[None], batch.positions_T[None])
        self._cache.write(0, batch, k[0].transpose(0, 1), v[0].transpose(0, 1))
        last = batch.last_rows
        ends = RaggedBatch([Segment(c.slot, c.start + len(c.next_tokens) - 1, 1) for c in committed], self._device)
        attended_BNE = self._cache.read(0, ends, q[0].transpose(0, 1)[last])
        return draft.finish(hidden_TH[last][None], attended_BNE.transpose(0, 1)[None])[0]

    def _extend(
        self, alive: Sequence[_Growing], hidden_FH: Tensor, plan: Plan, acceptance: Mapping[bool, Acceptance]
    ) -> None:
        """Draft one token more from every frontier node; what comes of it is the frontier then."""
        logits_FD = self._draft.logits(hidden_FH)
        best = likeliest(logits_FD, self._width)
        logprobs_Fw = (best.scores_Rk - logits_FD.logsumexp(dim=-1, keepdim=True)).tolist()
        tokens_Fw = self._draft.to_target_ids(best.ids_Rk).tolist()
        row = 0
        for g in alive:
            grown: list[tuple[float, int, int]] = []
            for parent in g.frontier:
                if g.greedy or self._width > 1:
                    children = list(zip(tokens_Fw[row], logprobs_Fw[row], strict=True))
                else:
                    children = [self._drawn(g, logits_FD[row])]
                for token, logprob in children:
                    g.nodes.append(Node(token, parent, _depth(g, parent) + 1, logprob))
                    chance = acceptance[g.greedy].of(math.exp(logprob))
                    g.worth.append((1.0 if parent == ROOT else g.worth[parent]) * chance)
                    grown.append((-g.worth[-1], len(g.nodes) - 1, row))
                row += 1
            grown = sorted(grown)[: self._width]
            # A drawn token is verified whatever it is: leaving out the unlikely ones would bend the distribution.
            worthy = [entry for entry in grown if g.probs or -entry[0] >= plan.row_worth]
            g.frontier, g.origins = [node for _, node, _ in worthy], [origin for _, _, origin in worthy]

    def _drawn(self, g: _Growing, logits_D: Tensor) -> tuple[int, float]:
        """A token drawn from the draft's distribution, and its log-probability there."""
        request = g.committed.request
        probs_D = sampling_probs(logits_D[None].cpu(), request.temperature, request.top_p, request.top_k)[0]
        drawn = draw(probs_D, g.committed.generator)
        probs_V = probs_D.new_zeros(self._draft.shape.vocab_size)
        probs_V[self._draft.t2d.cpu()] = probs_D
        g.probs.append(probs_V)
        return int(self._draft.to_target_ids(torch.tensor(drawn, device=self._device))), math.log(probs_D[drawn])

    def _feed(self, alive: Sequence[_Growing], hidden_FH: Tensor) -> Tensor:
        """[F, H] hidden states after the frontier's tokens."""
        batch = RaggedBatch([_segment(g) for g in alive], self._device)
        tokens_F = torch.tensor([g.nodes[node].token for g in alive for node in g.frontier], device=self._device)
        hidden_FH = hidden_FH[[origin for g in alive for origin in g.origins]]
        for g in alive:
            g.fed += g.frontier
        return self._run(tokens_F, hidden_FH, batch)

    def _run(self, tokens_T: Tensor, hidden_TH: Tensor, batch: RaggedBatch) -> Tensor:
        """[T, H] hidden states after rows that read the given tokens and hidden states."""
        found = self._passes.run(batch, (tokens_T, hidden_TH)) if self._passes else None
        return (found or self._pass((tokens_T, hidden_TH), batch))[0]

    def _pass(self, inputs: Sequence[Tensor], batch: Tokens) -> tuple[Tensor, ...]:
        tokens_T, hidden_TH = inputs
        draft = self._draft
        q, k, v = draft.project(self._embeddings_VH[tokens_T][None], hidden_TH[None], batch.positions_T[None])
        attended_TNE = self._cache.attend(0, batch, *(x[0].transpose(0, 1) for x in (q, k, v)))
        return (draft.finish(hidden_TH[None], attended_TNE.transpose(0, 1)[None])[0],)

    def _proposal(self, g: _Growing, plan: Plan) -> Proposal:
        """The nodes that are worth verifying, renumbered; an ancestor is worth at least as much as what follows it."""
        if g.probs:
            return Proposal(tuple(g.nodes), torch.stack(g.probs))
        ranked = sorted(range(len(g.nodes)), key=lambda node: (-g.worth[node], node))[: self._nodes]
        kept = sorted(node for node in ranked if g.worth[node] >= plan.row_worth)
        number = {ROOT: ROOT} | {node: i for i, node in enumerate(kept)}
        nodes = [g.nodes[node]._replace(parent=number[g.nodes[node].parent]) for node in kept]
        left_out = [
            node._replace(parent=number[node.parent])
            for i, node in enumerate(g.nodes)
            if i not in number and node.parent in number
        ]
        return Proposal(tuple(nodes), left_out=tuple(left_out))


def pack_draft(draft: EagleDraft, device: torch.device) -> EagleDraft:
    """A copy with the fastest kernels of the device. Rounding the draft's weights changes what is proposed, never what
    is said."""
    packed = copy.deepcopy(draft).requires_grad_(requires_grad=False).eval().to(device)
    replace_linears(packed, narrow(device))
    replace_norms(packed)
    return packed


def _goes_on(g: _Growing, depth: int, plan: Plan, acceptance: Mapping[bool, Acceptance]) -> bool:
    """Whether another token after ``depth`` of them is worth a drafting step and a row."""
    if not g.frontier or depth >= min(plan.depth, g.committed.room):
        return False
    best = max(g.worth[node] for node in g.frontier)
    return best * acceptance[g.greedy].at(depth + 1) >= plan.step_worth


def _depth(g: _Growing, node: int) -> int:
    return 0 if node == ROOT else g.nodes[node].depth


def _segment(g: _Growing) -> Segment:
    """Where the frontier's rows go in the draft's cache, and what they see there."""
    start, length = g.rows + len(g.fed), len(g.frontier)
    if length == 1 and len(g.fed) + 1 == g.nodes[g.frontier[0]].depth:
        return Segment(g.committed.slot, start, length)
    sees = visible([node.parent for node in g.nodes])[np.ix_(g.frontier, [*g.fed, *g.frontier])]
    positions = tuple(g.rows + g.nodes[node].depth - 1 for node in g.frontier)
    return Segment(g.committed.slot, start, length, Branching(g.rows, sees, positions))
