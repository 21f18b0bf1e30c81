"""The draft run over many chains at once: what serving computes token by token with a cache.

A chain starts at row t of a window: feature g_t and the embedding of x_{t+1}. Each further step takes its own output of
the step before in place of a feature, the next token of the chain, and rotary position t + k. It attends to the step-0
keys and values of the window's rows up to t, and to those of its own steps 1..k.

Shapes: B windows, T rows, R chains, A chains of one step, Q chains of the window with the most, H hidden size, N heads,
M key/value heads, G = N / M, E head size, V target vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.speculator.network import EagleDraft


class Unroll:
    """The recursion over chains of one batch; ``first`` once, then ``advance`` for each further token."""

    def __init__(
        self,
        draft: EagleDraft,
        embeddings_VH: Tensor,
        tokens_BT: Tensor,
        features_BTF: Tensor,
        window_R: Tensor,
        row_R: Tensor,
    ) -> None:
        """Compute the keys and values that all chains share.

        Args:
            draft: The network; gradients flow into it.
            embeddings_VH: The target's frozen token embeddings, of any float type.
            tokens_BT: Tokens of the windows, padded at their ends; row t reads token t + 1.
            features_BTF: The target's states after each token.
            window_R: Window of each chain.
            row_R: Row t at which each chain starts.
        """
        self._draft = draft
        self._embeddings = embeddings_VH
        self._window, self._row = window_R, row_R
        windows, rows = tokens_BT.shape[0], tokens_BT.shape[1] - 1
        positions_BT = torch.arange(rows, device=tokens_BT.device).expand(windows, rows)
        self._fused_BTH = draft.fuse(features_BTF[:, :-1].to(draft.fc.weight.dtype))
        shared = draft.project(self._embed(tokens_BT[:, 1:]), self._fused_BTH, positions_BT)
        self._q_BTNE, self._k_BMTE, self._v_BMTE = shared.q_BNTE.transpose(1, 2), shared.k_BMTE, shared.v_BMTE
        # Linear layers see the chains of a step as one flat list; attention sees them by window, each in a slot of its
        # own that it keeps for all steps.
        chain_RB = window_R[:, None] == torch.arange(windows, device=window_R.device)
        self._slot = chain_RB.cumsum(0).gather(1, window_R[:, None]).squeeze(1) - 1
        self._slots = int(self._slot.max()) + 1 if len(window_R) else 0
        row_BQ = row_R.new_zeros(windows, self._slots).index_put((window_R, self._slot), row_R)
        beyond_BQT = positions_BT[:, None, :] > row_BQ[:, :, None]
        self._beyond_B11QT = beyond_BQT[:, None, None]
        self._own_k: list[Tensor] = []
        self._own_v: list[Tensor] = []

    def first(self, chains: Tensor) -> Tensor:
        """Step 0 of the given chains ([A] indices): hidden states [A, H] before ``norm``."""
        at = self._window[chains], self._row[chains]
        attended = self._attend(self._spread(self._q_BTNE[at], chains), chains)
        return self._finish(self._fused_BTH[at], attended)

    def advance(self, chains: Tensor, tokens_A: Tensor, hidden_AH: Tensor) -> Tensor:
        """The next step of the given chains, from the token that each takes and its hidden state of the step before.

        The chains must have been among those of every step since the first one.
        """
        position_A = self._row[chains] + len(self._own_k) + 1
        p = self._draft.project(self._embed(tokens_A)[None], hidden_AH[None], position_A[None])
        self._own_k.append(self._spread(p.k_BMTE[0].transpose(0, 1), chains))
        self._own_v.append(self._spread(p.v_BMTE[0].transpose(0, 1), chains))
        return self._finish(hidden_AH, self._attend(self._spread(p.q_BNTE[0].transpose(0, 1), chains), chains))

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._embeddings[tokens].to(self._draft.fc.weight.dtype)

    def _finish(self, hidden_AH: Tensor, attended_ANE: Tensor) -> Tensor:
        return self._draft.finish(hidden_AH[None], attended_ANE.transpose(0, 1)[None])[0]

    def _spread(self, x_ANE: Tensor, chains: Tensor) -> Tensor:
        """Flat rows by window and slot [B, N, Q, E]; slots of other chains stay zero."""
        blank = x_ANE.new_zeros(len(self._k_BMTE), self._slots, *x_ANE.shape[1:])
        return blank.index_put((self._window[chains], self._slot[chains]), x_ANE).transpose(1, 2)

    def _attend(self, q_BNQE: Tensor, chains: Tensor) -> Tensor:
        """Attention of the spread queries over the shared rows and the own steps: [A, N, E]."""
        windows, heads, rows, size = self._k_BMTE.shape
        q_BMGQE = q_BNQE.reshape(windows, heads, -1, self._slots, size) * size**-0.5
        shared = q_BMGQE @ self._k_BMTE[:, :, None].transpose(-1, -2)
        scores = [shared.masked_fill(self._beyond_B11QT, -torch.inf)]
        scores += [(q_BMGQE * k_BMQE[:, :, None]).sum(-1, keepdim=True) for k_BMQE in self._own_k]
        weights = torch.cat(scores, dim=-1).softmax(dim=-1)
        out = weights[..., :rows] @ self._v_BMTE[:, :, None]
        for k, v_BMQE in enumerate(self._own_v):
            out = out + weights[..., rows + k, None] * v_BMQE[:, :, None]
        return out.flatten(1, 2).transpose(1, 2)[self._window[chains], self._slot[chains]]
