"""The training-time test: the draft trees of a batch, and the recursion of the draft over them.

Row t of a sample reads feature g_t and token x_{t+1}. Its teacher is the target's distribution after consuming
x_{t+1}::

    tokens      x0  x1  x2  x3  x4
    features    g0  g1  g2  g3  g4
    row t=1:    g1 + emb(x2)  ->  predicts x3,  teacher after x2

A draft tree starts at each row. TTT step k computes level k of all trees: a node of the row's committed tokens reads
x_{t+1+k} and learns from the distribution after it; where that is unknown, as past the last row, there is no loss. A
draft that was rejected below root x_p branches off the committed tokens of row p - 1, so the row, the accepted tokens
and the beginnings that branches share are computed once. A chain is a tree without branches.

Each step after step 0 takes the output of the node's parent, one step earlier, in place of a feature, and rotary
position p + t + k, where p is the position of the sample in its request. It attends to the step-0 keys and values of
the sample's rows up to t, to those of its ancestors from step 1 on, and to its own: the list of each node's ancestors
is the tree mask. Serving computes the same token by token with a key/value cache. Rows that a sample does not own
(``Batch.own_BT``) contribute keys and values only.

The teacher is the recorded top k, restricted to the draft vocabulary and renormalised; the unrecorded tail is ignored.
A position whose likeliest token is outside the vocabulary is not learned from: the draft cannot agree with the target
there, and renormalising would teach the second choice in its place, as certain.

Shapes: B samples, T tokens, K TTT steps, A nodes of one level, Q nodes of the sample with the most, k teacher width,
D drafted tokens that were not accepted, F feature width, H hidden size, N heads, M key/value heads, G = N / M, E head
size, V target vocabulary, S keys that a node attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from schemas.speculator.network import EagleDraft
from trainer.data.batch import Batch
from trainer.data.samples import Teacher


class DraftTeacher(NamedTuple):
    """Teacher distributions over the draft vocabulary: ids and probabilities [.., k], and where they are usable."""

    ids: Tensor
    probs: Tensor
    usable: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TreeLevel:
    """The nodes of all trees that one TTT step computes, the committed tokens first."""

    parent_A: Tensor
    """Index of each node's parent in the previous level; meaningless in level 0."""
    tokens_A: Tensor
    ids_Ak: Tensor
    probs_Ak: Tensor
    learned_A: Tensor
    weight_A: Tensor
    committed: int
    """Number of nodes that are committed tokens."""
    suffix_predicted_A: Tensor
    """[committed] whether the suffix draft from the same root is right up to the token after the node."""
    index_BT: Tensor
    """Index of the node that computes this step of each row; -1 where there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class DraftTrees:
    """All trees of a batch, without nodes that neither have a teacher nor lead to one that has."""

    sample_A: Tensor
    """Sample of each node of level 0."""
    row_A: Tensor
    """Row of each node of level 0."""
    levels: tuple[TreeLevel, ...]


def build_draft_trees(draft: EagleDraft, batch: Batch, steps: int, min_prob: float | None) -> DraftTrees:
    """Build the draft trees of a batch.

    Args:
        draft: Defines the vocabulary of the teacher.
        batch: Samples, with the drafted tokens.
        steps: K, at least 1; drafted tokens are learned from in steps 1..K-1.
        min_prob: Minimum probability of the first rejected token for a drafted token to be learned from; None excludes
            all drafted tokens.
    """
    teacher_BT = restrict_teacher(draft, batch.teacher_BT)
    usable_BT = batch.known_BT & teacher_BT.usable
    learned_KBT = [batch.own_BT & learned_BT for learned_BT in _shift_steps(usable_BT, steps)]
    suffix_KBT = _shift_steps(batch.suffix_predicted_BT, steps)
    drafted = batch.drafted
    teacher_D = restrict_teacher(draft, drafted.teacher_D)
    learned_D = drafted.learned_D & teacher_D.usable
    learned_D &= drafted.prob_D >= min_prob if min_prob is not None else torch.zeros_like(learned_D)

    needed_KBT, needed_D = _find_needed(batch, learned_KBT, learned_D)
    levels: list[TreeLevel] = []
    index_D = torch.full_like(drafted.parent_D, -1)
    for k in range(steps):
        sample, row = needed_KBT[k].nonzero(as_tuple=True)
        (node,) = (needed_D & (drafted.depth_D == k)).nonzero(as_tuple=True)
        parents = [levels[k - 1].index_BT[sample, row], _parents(batch, node, levels[k - 1], index_D)] if k else [row]
        at = sample, row + 1 + k
        levels.append(
            TreeLevel(
                parent_A=torch.cat(parents),
                tokens_A=torch.cat([batch.tokens_BT[at], drafted.token_D[node]]),
                ids_Ak=torch.cat([teacher_BT.ids[at], teacher_D.ids[node]]),
                probs_Ak=torch.cat([teacher_BT.probs[at], teacher_D.probs[node]]),
                learned_A=torch.cat([learned_KBT[k][sample, row], learned_D[node]]),
                weight_A=torch.cat([batch.weight_B[sample], drafted.weight_D[node]]),
                committed=len(row),
                suffix_predicted_A=torch.stack([suffix_BT[sample, row] for suffix_BT in suffix_KBT[: k + 1]]).all(0),
                index_BT=_enumerate(needed_KBT[k]),
            )
        )
        index_D[node] = len(row) + torch.arange(len(node), device=node.device)
    sample, row = needed_KBT[0].nonzero(as_tuple=True)
    return DraftTrees(sample, row, tuple(levels))


def restrict_teacher(draft: EagleDraft, teacher: Teacher) -> DraftTeacher:
    """Restrict the teacher's top k to the draft vocabulary, and renormalise it."""
    kept = draft.t2d[teacher.ids]
    probs = torch.where(kept, teacher.logprobs.exp(), 0)
    mass = probs.sum(dim=-1, keepdim=True)
    ids = torch.where(kept, (draft.t2d.cumsum(0) - 1)[teacher.ids], 0)
    return DraftTeacher(ids, probs / mass.clamp_min(torch.finfo(mass.dtype).tiny), kept[..., 0])


class DraftUnroll:
    """The recursion over the trees of one batch: call ``first`` once, then ``advance`` for each further step."""

    def __init__(
        self,
        draft: EagleDraft,
        embeddings_VH: Tensor,
        tokens_BT: Tensor,
        features_BTF: Tensor,
        position_B: Tensor | None = None,
    ) -> None:
        """Compute the keys and values that all trees share.

        Args:
            draft: The network; gradients flow into it.
            embeddings_VH: The target's frozen token embeddings, of any float type.
            tokens_BT: Tokens of the samples, padded at their ends; row t reads token t + 1.
            features_BTF: The target's states after each token.
            position_B: Rotary position of each sample's row 0; None for 0.
        """
        self._draft = draft
        self._embeddings_VH = embeddings_VH
        samples, rows = tokens_BT.shape[0], tokens_BT.shape[1] - 1
        self._position_B = tokens_BT.new_zeros(samples) if position_B is None else position_B
        positions_BT = self._position_B[:, None] + torch.arange(rows, device=tokens_BT.device)
        self._fused_BTH = draft.fuse(features_BTF[:, :-1].to(draft.fc.weight.dtype))
        shared = draft.project(self._embed(tokens_BT[:, 1:]), self._fused_BTH, positions_BT)
        self._q_BTNE, self._k_BMTE, self._v_BMTE = shared.q_BNTE.transpose(1, 2), shared.k_BMTE, shared.v_BMTE
        self._node_kv: list[tuple[Tensor, Tensor]] = []
        self._ancestors: list[Tensor] = []

    def first(self, sample_A: Tensor, row_A: Tensor) -> Tensor:
        """Compute step 0 of trees at the given rows; return their hidden states [A, H]."""
        self._sample_A, self._row_A = sample_A, row_A
        self._hidden_AH = self._finish(self._fused_BTH[sample_A, row_A], self._q_BTNE[sample_A, row_A])
        return self._hidden_AH

    def advance(self, parent_A: Tensor, tokens_A: Tensor) -> Tensor:
        """Compute the next step; return the hidden states [A, H] of nodes that read the given tokens.

        Args:
            parent_A: Index of each node's parent in the previous step; nodes may share one.
            tokens_A: Token that each node reads.
        """
        self._sample_A, self._row_A = self._sample_A[parent_A], self._row_A[parent_A]
        hidden_AH = self._hidden_AH.index_select(0, parent_A)
        position_A = self._position_B[self._sample_A] + self._row_A + len(self._node_kv) + 1
        p = self._draft.project(self._embed(tokens_A)[None], hidden_AH[None], position_A[None])
        self._node_kv.append((p.k_BMTE[0].transpose(0, 1), p.v_BMTE[0].transpose(0, 1)))
        self._ancestors = [
            *(index_A[parent_A] for index_A in self._ancestors),
            torch.arange(len(parent_A), device=parent_A.device),
        ]
        self._hidden_AH = self._finish(hidden_AH, p.q_BNTE[0].transpose(0, 1))
        return self._hidden_AH

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._embeddings_VH[tokens].to(self._draft.fc.weight.dtype)

    def _finish(self, hidden_AH: Tensor, q_ANE: Tensor) -> Tensor:
        attended_ANE = self._attend(q_ANE)
        return self._draft.finish(hidden_AH[None], attended_ANE.transpose(0, 1)[None])[0]

    def _attend(self, q_ANE: Tensor) -> Tensor:
        """Attend to the shared rows, the ancestors and the node itself; return [A, N, E]."""
        heads, rows, size = self._k_BMTE.shape[1:]
        layout = _SampleLayout(self._sample_A, len(self._k_BMTE))
        q_BNQE = layout.pad(q_ANE).transpose(1, 2)
        samples, all_heads, nodes, _ = q_BNQE.shape
        q_BMGQE = q_BNQE.reshape(samples, heads, all_heads // heads, nodes, size) * size**-0.5
        beyond_BQT = torch.arange(rows, device=q_ANE.device) > layout.pad(self._row_A)[:, :, None]
        shared_BMGQT = q_BMGQE @ self._k_BMTE[:, :, None].transpose(-1, -2)
        scores = [shared_BMGQT.masked_fill(beyond_BQT[:, None, None], -torch.inf)]
        node_kv = zip(self._node_kv, self._ancestors, strict=True)
        node_BMQE = [[layout.pad(x.index_select(0, at)).transpose(1, 2) for x in kv] for kv, at in node_kv]
        scores += [(q_BMGQE * k_BMQE[:, :, None]).sum(-1, keepdim=True) for k_BMQE, _ in node_BMQE]
        weights_BMGQS = torch.cat(scores, dim=-1).softmax(dim=-1)
        out_BMGQE = weights_BMGQS[..., :rows] @ self._v_BMTE[:, :, None]
        for k, (_, v_BMQE) in enumerate(node_BMQE):
            out_BMGQE = out_BMGQE + weights_BMGQS[..., rows + k, None] * v_BMQE[:, :, None]
        return layout.unpad(out_BMGQE.flatten(1, 2).transpose(1, 2))


class _SampleLayout:
    """Converts a level's flat list of nodes, which linear layers read, to nodes by sample, which attention reads."""

    def __init__(self, sample_A: Tensor, samples: int) -> None:
        in_sample_AB = sample_A[:, None] == torch.arange(samples, device=sample_A.device)
        number_A = (in_sample_AB.cumsum(0).gather(1, sample_A[:, None]) - 1).squeeze(1)
        self._shape = samples, int(number_A.max()) + 1 if len(sample_A) else 0
        self._index_A = sample_A * self._shape[1] + number_A

    def pad(self, x_A: Tensor) -> Tensor:
        """Return [B, Q, ..] of [A, ..], padded with zeros."""
        blank = x_A.new_zeros(self._shape[0] * self._shape[1], *x_A.shape[1:])
        return blank.index_copy(0, self._index_A, x_A).view(*self._shape, *x_A.shape[1:])

    def unpad(self, x_BQ: Tensor) -> Tensor:
        """Return [A, ..] of [B, Q, ..]."""
        return x_BQ.flatten(0, 1).index_select(0, self._index_A)


def _find_needed(batch: Batch, learned_KBT: Sequence[Tensor], learned_D: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return which rows each step computes, and which drafted tokens: those with a teacher and their ancestors."""
    drafted, steps = batch.drafted, len(learned_KBT)
    needed_KBT, needed_D = list(learned_KBT), learned_D & (drafted.depth_D < steps)
    for k in range(steps - 1, 0, -1):
        (node,) = (needed_D & (drafted.depth_D == k)).nonzero(as_tuple=True)
        from_row = drafted.parent_D[node] < 0
        needed_D[drafted.parent_D[node[~from_row]]] = True
        needed_KBT[k - 1] = needed_KBT[k - 1] | needed_KBT[k]
        needed_KBT[k - 1][drafted.sample_D[node[from_row]], drafted.row_D[node[from_row]]] = True
    return needed_KBT, needed_D


def _shift_steps(x_BT: Tensor, steps: int) -> list[Tensor]:
    """Return [B, T] for each TTT step: the value at the token that it reads in each row; false past the end."""
    length = x_BT.shape[1]
    return [F.pad(x_BT, (0, steps))[:, k + 1 : k + 1 + length] for k in range(steps)]


def _enumerate(needed_BT: Tensor) -> Tensor:
    """Return the index of each row among the needed ones; -1 for the others."""
    return torch.where(needed_BT, (needed_BT.flatten().cumsum(0) - 1).view_as(needed_BT), -1)


def _parents(batch: Batch, node: Tensor, previous: TreeLevel, index_D: Tensor) -> Tensor:
    """Return the index of each drafted token's parent in the previous level."""
    drafted = batch.drafted
    parent = drafted.parent_D[node]
    row_index = previous.index_BT[drafted.sample_D[node], drafted.row_D[node]]
    return torch.where(parent < 0, row_index, index_D[parent])
