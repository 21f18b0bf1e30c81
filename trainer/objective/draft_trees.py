"""The trees that a batch is learned from in one pass: each row's committed tokens, and what was drafted beside them.

Row t of a window reads feature g_t and token x_{t+1}, and its teacher is the target's distribution after consuming
x_{t+1}::

    tokens      x0  x1  x2  x3  x4
    features    g0  g1  g2  g3  g4
    row t=1:    g1 + emb(x2)  ->  predicts x3,  teacher after x2

Step k reads x_{t+1+k} and is taught by the distribution after it; where that is unknown, as behind the last row, there
is no loss. A draft that was rejected below root x_p leaves row p - 1 where it leaves the committed tokens, so the row,
the tokens that were kept and the beginnings that branches share are computed once.

The teacher is the recorded top k, restricted to the draft vocabulary and renormalised; the unrecorded tail is ignored.
Where less than ``MIN_KEPT_MASS`` of the target's probability is left, the position is not learned from: renormalising
would blow tokens that the target hardly considers up to certainty.

Shapes: B windows, T tokens, K steps, A nodes of one step, k teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from schemas.speculator.network import EagleDraft
from trainer.data.samples import Batch, Teacher

MIN_KEPT_MASS = 0.1


class Target(NamedTuple):
    """Teacher distributions over the draft vocabulary: ids and probabilities [.., k], and where they can be used."""

    ids: Tensor
    probs: Tensor
    usable: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The nodes of all trees that one step computes, the committed tokens first."""

    parent_A: Tensor
    """Each node's parent in the step before; of no meaning in step 0."""
    tokens_A: Tensor
    ids_Ak: Tensor
    probs_Ak: Tensor
    learned_A: Tensor
    weight_A: Tensor
    committed: int
    """How many of the nodes are committed tokens."""
    place_BT: Tensor
    """Node that computes this step of each row; -1 where none does."""


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """All trees of a batch, without what teaches nothing and leads to nothing."""

    window_A: Tensor
    """Of step 0, as ``row_A``."""
    row_A: Tensor
    steps: tuple[Step, ...]


def grow(draft: EagleDraft, batch: Batch, steps: int, min_prob: float | None) -> Forest:
    """The forest of a batch.

    Args:
        draft: Whose vocabulary is taught.
        batch: Windows, with what was drafted.
        steps: K, at least 1; drafted tokens are learned from at steps 1..K-1.
        min_prob: Of what was drafted only tokens that follow a rejected one of at least this probability; None leaves
            all of it out.
    """
    teacher_BT = restrict(draft, batch.teacher_BT)
    usable_BT = batch.known_BT & teacher_BT.usable
    length = usable_BT.shape[1]
    learned_KBT = [F.pad(usable_BT, (0, steps))[:, k + 1 : k + 1 + length] for k in range(steps)]
    drafted = batch.drafted
    teacher_D = restrict(draft, drafted.teacher_D)
    learned_D = drafted.learned_D & teacher_D.usable
    learned_D &= drafted.prob_D >= min_prob if min_prob is not None else torch.zeros_like(learned_D)

    needed_KBT, needed_D = _needed(batch, learned_KBT, learned_D)
    grown: list[Step] = []
    place_D = torch.full_like(drafted.parent_D, -1)
    for k in range(steps):
        window, row = needed_KBT[k].nonzero(as_tuple=True)
        (node,) = (needed_D & (drafted.depth_D == k)).nonzero(as_tuple=True)
        parents = [grown[k - 1].place_BT[window, row], _parents(batch, node, grown[k - 1], place_D)] if k else [row]
        at = window, row + 1 + k
        grown.append(
            Step(
                parent_A=torch.cat(parents),
                tokens_A=torch.cat([batch.tokens_BT[at], drafted.token_D[node]]),
                ids_Ak=torch.cat([teacher_BT.ids[at], teacher_D.ids[node]]),
                probs_Ak=torch.cat([teacher_BT.probs[at], teacher_D.probs[node]]),
                learned_A=torch.cat([learned_KBT[k][window, row], learned_D[node]]),
                weight_A=torch.cat([batch.weight_B[window], drafted.weight_D[node]]),
                committed=len(row),
                place_BT=_places(needed_KBT[k]),
            )
        )
        place_D[node] = len(row) + torch.arange(len(node), device=node.device)
    window, row = needed_KBT[0].nonzero(as_tuple=True)
    return Forest(window, row, tuple(grown))


def restrict(draft: EagleDraft, teacher: Teacher) -> Target:
    """The teacher over the draft vocabulary: what it keeps of the top k, renormalised."""
    kept = draft.t2d[teacher.ids]
    probs = torch.where(kept, teacher.logprobs.exp(), 0)
    mass = probs.sum(dim=-1, keepdim=True)
    ids = torch.where(kept, (draft.t2d.cumsum(0) - 1)[teacher.ids], 0)
    return Target(ids, probs / mass.clamp_min(MIN_KEPT_MASS), mass.squeeze(-1) >= MIN_KEPT_MASS)


def _needed(batch: Batch, learned_KBT: Sequence[Tensor], learned_D: Tensor) -> tuple[list[Tensor], Tensor]:
    """By step which rows are computed, and which drafted tokens: those that teach, and what leads to them."""
    drafted, steps = batch.drafted, len(learned_KBT)
    needed_KBT, needed_D = list(learned_KBT), learned_D & (drafted.depth_D < steps)
    for k in range(steps - 1, 0, -1):
        (node,) = (needed_D & (drafted.depth_D == k)).nonzero(as_tuple=True)
        from_row = drafted.parent_D[node] < 0
        needed_D[drafted.parent_D[node[~from_row]]] = True
        needed_KBT[k - 1] = needed_KBT[k - 1] | needed_KBT[k]
        needed_KBT[k - 1][drafted.window_D[node[from_row]], drafted.row_D[node[from_row]]] = True
    return needed_KBT, needed_D


def _places(needed_BT: Tensor) -> Tensor:
    """Number of each row among those needed, -1 of the others."""
    return torch.where(needed_BT, (needed_BT.flatten().cumsum(0) - 1).view_as(needed_BT), -1)


def _parents(batch: Batch, node: Tensor, before: Step, place_D: Tensor) -> Tensor:
    """Places in the step before of the parents of drafted tokens."""
    drafted = batch.drafted
    parent = drafted.parent_D[node]
    row_place = before.place_BT[drafted.window_D[node], drafted.row_D[node]]
    return torch.where(parent < 0, row_place, place_D[parent])
