"""The draft's side of a round: follow what the target committed, then propose a chain for every running request.

Row t of the draft pairs the target's features after token t with the embedding of token t + 1 and stands at rotary
position t. Committed rows are computed from true features once and stay; the rows of a proposed chain follow them in
the same slot with the draft's own hidden states, and are overwritten when the target has decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.speculator.acceptance import sampling_probs
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from serving.transformers.cache import RaggedBatch, Segment, SlotCache


@dataclass(frozen=True, slots=True)
class Committed:
    """Rows of one request that the draft has not seen yet, and how to draw from it."""

    slot: int
    start: int
    """Position of the first row."""
    features_TF: Tensor
    next_tokens: Sequence[int]
    """[T] the token after each row; the last one is the root of the coming round."""
    temperature: float
    top_p: float
    generator: torch.Generator


@dataclass(frozen=True, slots=True)
class Proposal:
    """A chain for one request."""

    tokens: list[int]
    logprobs: list[float]
    """Of each token, under the distribution that it was drawn from; for a greedy request the draft's softmax."""
    probs_mV: Tensor | None
    """[m, V] those distributions over the target's vocabulary; None for a greedy request."""


class Drafter:
    """A draft network with a cache of its own. The target's embeddings are shared, never copied."""

    def __init__(self, draft: EagleDraft, embeddings_VH: Tensor, slots: int, positions: int) -> None:
        shape = draft.shape
        self._draft = draft.requires_grad_(requires_grad=False).eval()
        self._embeddings_VH = embeddings_VH
        self._cache = SlotCache(1, slots, shape.num_key_value_heads, positions, shape.head_dim)

    def propose(self, committed: Sequence[Committed], length: int) -> list[Proposal]:
        """A chain of ``length`` tokens for each request."""
        batch = RaggedBatch([Segment(c.slot, c.start, len(c.next_tokens)) for c in committed])
        hidden_TH = self._draft.fuse(torch.cat([c.features_TF for c in committed]))
        tokens_T = torch.tensor([token for c in committed for token in c.next_tokens])
        hidden_BH = self._run(batch, tokens_T, hidden_TH)[batch.last_rows]
        ends = [c.start + len(c.next_tokens) for c in committed]
        steps = []
        for step in range(length):
            drawn_B, logprobs_B, probs = self._draw(hidden_BH, committed)
            steps.append((drawn_B.tolist(), logprobs_B, probs))
            if step + 1 < length:
                batch = RaggedBatch([Segment(c.slot, end + step, 1) for c, end in zip(committed, ends, strict=True)])
                hidden_BH = self._run(batch, drawn_B, hidden_BH)
        return [
            Proposal(
                tokens=[tokens[i] for tokens, _, _ in steps],
                logprobs=[logprobs[i] for _, logprobs, _ in steps],
                probs_mV=torch.stack([probs[i] for _, _, probs in steps]) if request.temperature > 0 else None,
            )
            for i, request in enumerate(committed)
        ]

    def check(self, draft: EagleDraft) -> None:
        """Draft a few tokens from made-up features with the given weights.

        Raises:
            CheckpointError: the weights are of another shape, or give values that are not finite.
        """
        if draft.shape != self._draft.shape or not torch.equal(draft.d2t, self._draft.d2t):
            raise CheckpointError("the draft's shape or vocabulary is not that of this node's line")
        rows = 8
        trial = Drafter(draft, self._embeddings_VH, slots=1, positions=2 * rows)
        generator = torch.Generator().manual_seed(0)
        features_TF = torch.randn(rows, draft.shape.feature_width, generator=generator)
        with torch.inference_mode():
            (proposal,) = trial.propose([Committed(0, 0, features_TF, range(rows), 0.0, 1.0, generator)], length=4)
        if not torch.isfinite(torch.tensor(proposal.logprobs)).all():
            raise CheckpointError("smoke draft: log-probabilities are not finite")

    def load(self, draft: EagleDraft) -> None:
        """Copy weights in place. Rows of running requests keep the keys of the old weights until they end."""
        with torch.no_grad():
            for own, new in zip(self._draft.parameters(), draft.parameters(), strict=True):
                own.copy_(new)

    def _run(self, batch: RaggedBatch, tokens_T: Tensor, hidden_TH: Tensor) -> Tensor:
        """[T, H] hidden states of the rows, their keys and values left in the cache."""
        draft = self._draft
        q, k, v = draft.project(self._embeddings_VH[tokens_T][None], hidden_TH[None], batch.positions_T[None])
        attended_TNE = self._cache.attend(0, batch, q[0], k[0], v[0])
        return draft.finish(hidden_TH[None], attended_TNE.transpose(0, 1)[None])[0]

    def _draw(self, hidden_BH: Tensor, committed: Sequence[Committed]) -> tuple[Tensor, list[float], dict[int, Tensor]]:
        """The next token of every chain, its log-probability, and for sampled requests its distribution over V."""
        logits_BD = self._draft.logits(hidden_BH)
        best_BD = torch.log_softmax(logits_BD, dim=-1).max(dim=-1)
        drawn_B, logprobs_B = best_BD.indices.clone(), best_BD.values.clone()
        probs: dict[int, Tensor] = {}
        for i, request in enumerate(committed):
            if request.temperature > 0:
                probs_D = sampling_probs(logits_BD[i : i + 1], request.temperature, request.top_p)[0]
                drawn_B[i] = torch.multinomial(probs_D, 1, generator=request.generator)[0]
                logprobs_B[i] = probs_D[drawn_B[i]].log()
                probs[i] = self._over_target_vocabulary(probs_D)
        return self._draft.to_target_ids(drawn_B), logprobs_B.tolist(), probs

    def _over_target_vocabulary(self, probs_D: Tensor) -> Tensor:
        probs_V = probs_D.new_zeros(self._draft.shape.vocab_size)
        probs_V[self._draft.t2d] = probs_D
        return probs_V
