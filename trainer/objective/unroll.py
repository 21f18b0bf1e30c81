"""The draft run over many trees at once: what serving computes token by token with a cache.

A tree starts at row t of a window: feature g_t and the embedding of x_{t+1}. Each further step takes the output of its
parent, one step earlier, in place of a feature, the token that it reads, and rotary position t + k. It attends to the
step-0 keys and values of the window's rows up to t, to those of its ancestors from step 1 on, and to its own: the tree
mask is the list of each node's ancestors. A chain is the tree without branches.

Shapes: B windows, T rows, A nodes of one step, Q nodes of the window with the most, H hidden size, N heads, M key/value
heads, G = N / M, E head size, V target vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.speculator.network import EagleDraft


class Unroll:
    """The recursion over the trees of one batch; ``first`` once, then ``advance`` for each further step."""

    def __init__(self, draft: EagleDraft, embeddings_VH: Tensor, tokens_BT: Tensor, features_BTF: Tensor) -> None:
        """Compute the keys and values that all trees share.

        Args:
            draft: The network; gradients flow into it.
            embeddings_VH: The target's frozen token embeddings, of any float type.
            tokens_BT: Tokens of the windows, padded at their ends; row t reads token t + 1.
            features_BTF: The target's states after each token.
        """
        self._draft = draft
        self._embeddings = embeddings_VH
        windows, rows = tokens_BT.shape[0], tokens_BT.shape[1] - 1
        positions_BT = torch.arange(rows, device=tokens_BT.device).expand(windows, rows)
        self._fused_BTH = draft.fuse(features_BTF[:, :-1].to(draft.fc.weight.dtype))
        shared = draft.project(self._embed(tokens_BT[:, 1:]), self._fused_BTH, positions_BT)
        self._q_BTNE, self._k_BMTE, self._v_BMTE = shared.q_BNTE.transpose(1, 2), shared.k_BMTE, shared.v_BMTE
        self._own: list[tuple[Tensor, Tensor]] = []
        self._ancestors: list[Tensor] = []

    def first(self, window_A: Tensor, row_A: Tensor) -> Tensor:
        """Step 0 of trees at the given rows: hidden states [A, H], as the next step takes them."""
        self._window, self._row = window_A, row_A
        self._hidden_AH = self._finish(self._fused_BTH[window_A, row_A], self._q_BTNE[window_A, row_A])
        return self._hidden_AH

    def advance(self, parent_A: Tensor, tokens_A: Tensor) -> Tensor:
        """The next step: hidden states [A, H] of nodes that read the given tokens.

        Args:
            parent_A: Each node's parent among the nodes of the step before; several may share one.
            tokens_A: The token that each reads.
        """
        self._window, self._row = self._window[parent_A], self._row[parent_A]
        hidden_AH = self._hidden_AH.index_select(0, parent_A)
        position_A = self._row + len(self._own) + 1
        p = self._draft.project(self._embed(tokens_A)[None], hidden_AH[None], position_A[None])
        self._own.append((p.k_BMTE[0].transpose(0, 1), p.v_BMTE[0].transpose(0, 1)))
        self._ancestors = [
            *(place_A[parent_A] for place_A in self._ancestors),
            torch.arange(len(parent_A), device=parent_A.device),
        ]
        self._hidden_AH = self._finish(hidden_AH, p.q_BNTE[0].transpose(0, 1))
        return self._hidden_AH

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._embeddings[tokens].to(self._draft.fc.weight.dtype)

    def _finish(self, hidden_AH: Tensor, q_ANE: Tensor) -> Tensor:
        attended_ANE = self._attend(q_ANE)
        return self._draft.finish(hidden_AH[None], attended_ANE.transpose(0, 1)[None])[0]

    def _attend(self, q_ANE: Tensor) -> Tensor:
        """Attention over the shared rows, the ancestors and the node itself: [A, N, E]."""
        heads, rows, size = self._k_BMTE.shape[1:]
        slots = _Slots(self._window, len(self._k_BMTE))
        q_BNQE = slots.spread(q_ANE).transpose(1, 2)
        windows, all_heads, nodes, _ = q_BNQE.shape
        q_BMGQE = q_BNQE.reshape(windows, heads, all_heads // heads, nodes, size) * size**-0.5
        beyond_BQT = torch.arange(rows, device=q_ANE.device) > slots.spread(self._row)[:, :, None]
        shared_BMGQT = q_BMGQE @ self._k_BMTE[:, :, None].transpose(-1, -2)
        scores = [shared_BMGQT.masked_fill(beyond_BQT[:, None, None], -torch.inf)]
        own = zip(self._own, self._ancestors, strict=True)
        own_BMQE = [[slots.spread(x.index_select(0, at)).transpose(1, 2) for x in kv] for kv, at in own]
        scores += [(q_BMGQE * k_BMQE[:, :, None]).sum(-1, keepdim=True) for k_BMQE, _ in own_BMQE]
        weights_BMGQS = torch.cat(scores, dim=-1).softmax(dim=-1)
        out_BMGQE = weights_BMGQS[..., :rows] @ self._v_BMTE[:, :, None]
        for k, (_, v_BMQE) in enumerate(own_BMQE):
            out_BMGQE = out_BMGQE + weights_BMGQS[..., rows + k, None] * v_BMQE[:, :, None]
        return slots.gather(out_BMGQE.flatten(1, 2).transpose(1, 2))


class _Slots:
    """Nodes by window: linear layers see the nodes of a step as one flat list, attention sees those of each window."""

    def __init__(self, window_A: Tensor, windows: int) -> None:
        in_window_AB = window_A[:, None] == torch.arange(windows, device=window_A.device)
        slot_A = (in_window_AB.cumsum(0).gather(1, window_A[:, None]) - 1).squeeze(1)
        self._shape = windows, int(slot_A.max()) + 1 if len(window_A) else 0
        self._place_A = window_A * self._shape[1] + slot_A

    def spread(self, x_A: Tensor) -> Tensor:
        """[B, Q, ..] of [A, ..]; slots without a node are zero."""
        blank = x_A.new_zeros(self._shape[0] * self._shape[1], *x_A.shape[1:])
        return blank.index_copy(0, self._place_A, x_A).view(*self._shape, *x_A.shape[1:])

    def gather(self, x_BQ: Tensor) -> Tensor:
        """[A, ..] of [B, Q, ..]."""
        return x_BQ.flatten(0, 1).index_select(0, self._place_A)
