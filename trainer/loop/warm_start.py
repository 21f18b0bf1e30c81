"""A draft of a new line begins with what a draft of another line has learned, as far as their shapes allow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from schemas.speculator.network import EagleDraft

_HEAD, _FUSION = "lm_head.weight", "fc.weight"


@dataclass(frozen=True, slots=True)
class Carried:
    """What a draft was given of another line's."""

    tensors: tuple[str, ...]
    """Parameters that were taken, ``lm_head.weight`` among them if any of its rows was."""
    left: tuple[str, ...]
    """Parameters that stay as they were, because they do not fit."""
    tokens: int
    """Rows of the head that were taken: draft tokens that both lines have."""

    def __str__(self) -> str:
        if not self.tensors:
            return "nothing fits"
        left = f"; left as they were: {', '.join(self.left)}" if self.left else ""
        return f"{len(self.tensors)} of {len(self.tensors) + len(self.left)} tensors, {self.tokens} draft tokens{left}"


def carry_over(old: EagleDraft, new: EagleDraft) -> Carried:
    """Copy into ``new`` every parameter of ``old`` that has the same shape there, and the head row by row.

    Rows of the head go by the target token that they stand for, through both d2t tables; tokens that only the new
    draft has keep their rows. Where the targets' vocabularies differ in size an id need not mean the same token, so no
    row is taken. ``fc`` stays where only one of the two reads normed states. ``d2t`` and ``t2d`` are the new line's in
    any case.

    Args:
        old: Stays as it is.
        new: At day 0; changed in place.
    """
    theirs, ours = dict(old.named_parameters()), dict(new.named_parameters())
    tokens = _carry_head(old, new)
    taken = [_HEAD] if tokens else []
    unlike = {_HEAD} if old.shape.normed == new.shape.normed else {_HEAD, _FUSION}
    with torch.no_grad():
        for name in (ours.keys() & theirs.keys()) - unlike:
            if ours[name].shape == theirs[name].shape:
                ours[name].copy_(theirs[name])
                taken.append(name)
    return Carried(
        tensors=tuple(name for name in ours if name in taken),
        left=tuple(name for name in ours if name not in taken),
        tokens=tokens,
    )


@torch.no_grad()
def _carry_head(old: EagleDraft, new: EagleDraft) -> int:
    if (old.shape.vocab_size, old.shape.hidden_size) != (new.shape.vocab_size, new.shape.hidden_size):
        return 0
    both_V = old.t2d & new.t2d
    new.lm_head.weight[_rows(new)[both_V]] = old.lm_head.weight[_rows(old)[both_V]].to(new.lm_head.weight.dtype)
    return int(both_V.sum())


def _rows(draft: EagleDraft) -> Tensor:
    """[V] row of the head for each target token that the draft has; kept ids are ascending."""
    return draft.t2d.cumsum(0) - 1
