"""Initial weights of a training: a registered version, a folder, day 0, or another line's draft where shapes allow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from torch import Tensor

from schemas.settings import DAY_0, Settings, SettingsError
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from trainer.data.target import Target
from trainer.release.evaluation import read_draft
from trainer.release.registry import SpeculatorRegistry

log = structlog.get_logger()

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


def load_initial_draft(settings: Settings, target: Target, registry: SpeculatorRegistry) -> tuple[str, EagleDraft]:
    """Return version and weights with which training begins, as ``train.warm_start`` says.

    Raises:
        SettingsError: the folder holds no draft of this line.
        RegistryError: no answer.
        CheckpointError: the registry's files differ from the registered ones.
    """
    start = settings.train.warm_start
    if start == "alias":
        return _load_by_alias(settings, target, registry)
    if start == DAY_0:
        return settings.speculator.day_0, target.day_0
    if start.isdecimal():
        return start, read_draft(registry, target.line, start)
    try:
        return start, checkpoint.read(Path(start), target.line)
    except CheckpointError as error:
        raise SettingsError(f"train.warm_start: {error}") from error


def _load_by_alias(settings: Settings, target: Target, registry: SpeculatorRegistry) -> tuple[str, EagleDraft]:
    """Return the champion of the line.

    A line without a champion starts with the weights of the champion of ``train.parent_line`` that fit, named
    LINE/VERSION; else with the draft of day 0.
    """
    champion = registry.aliases(target.line).get("champion")
    if champion is not None:
        return champion, read_draft(registry, target.line, champion)
    day_0, parent_line = (settings.speculator.day_0, target.day_0), settings.train.parent_line
    if not parent_line:
        return day_0
    parent = registry.aliases(parent_line).get("champion")
    if parent is None:
        log.warning("warm_start_skipped", parent_line=parent_line, why="no such line, or it has no champion")
        return day_0
    draft = target.new_draft()
    carried = carry_over(read_draft(registry, parent_line, parent), draft)
    log.info("warm_start", parent_line=parent_line, version=parent, carried=str(carried))
    return (f"{parent_line}/{parent}", draft) if carried.tensors else day_0
