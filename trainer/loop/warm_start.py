"""Initial weights of a training: a registered version, a folder, day 0, or another line's draft where shapes allow.

Shapes: V target vocabulary.
"""

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
        return start, checkpoint.read_checkpoint(Path(start), target.line)
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
        log.warning("warm_start_skipped", parent_line=parent_line, reason="no such line, or it has no champion")
        return day_0
    draft = target.new_draft()
    copied = copy_weights(read_draft(registry, parent_line, parent), draft)
    log.info("weights_copied", parent_line=parent_line, version=parent, copied=str(copied))
    return (f"{parent_line}/{parent}", draft) if copied.parameters else day_0


@dataclass(frozen=True, slots=True)
class CopiedWeights:
    """Which weights a draft received from another line's draft."""

    parameters: tuple[str, ...]
    """Copied parameters; ``lm_head.weight`` is among them if any of its rows was copied."""
    unchanged: tuple[str, ...]
    """Parameters that do not fit and keep their values."""
    tokens: int
    """Copied rows of the head: draft tokens that both lines have."""

    def __str__(self) -> str:
        if not self.parameters:
            return "nothing fits"
        unchanged = f"; unchanged: {', '.join(self.unchanged)}" if self.unchanged else ""
        total = len(self.parameters) + len(self.unchanged)
        return f"{len(self.parameters)} of {total} tensors, {self.tokens} draft tokens{unchanged}"


def copy_weights(old: EagleDraft, new: EagleDraft) -> CopiedWeights:
    """Copy into ``new`` every parameter of ``old`` that has the same shape there, and the head row by row.

    Rows of the head are matched by their target token, through both d2t tables; tokens that only the new draft has keep
    their rows. Where the targets' vocabularies differ in size, an id need not mean the same token, so no row is copied.
    ``fc`` is unchanged where only one of the two reads normed states. ``d2t`` and ``t2d`` are always the new line's.

    Args:
        old: Is not modified.
        new: At day 0; modified in place.
    """
    old_parameters, new_parameters = dict(old.named_parameters()), dict(new.named_parameters())
    tokens = _copy_head(old, new)
    copied = [_HEAD] if tokens else []
    excluded = {_HEAD} if old.shape.is_normed == new.shape.is_normed else {_HEAD, _FUSION}
    with torch.no_grad():
        for name in (new_parameters.keys() & old_parameters.keys()) - excluded:
            if new_parameters[name].shape == old_parameters[name].shape:
                new_parameters[name].copy_(old_parameters[name])
                copied.append(name)
    return CopiedWeights(
        parameters=tuple(name for name in new_parameters if name in copied),
        unchanged=tuple(name for name in new_parameters if name not in copied),
        tokens=tokens,
    )


@torch.no_grad()
def _copy_head(old: EagleDraft, new: EagleDraft) -> int:
    if (old.shape.vocab_size, old.shape.hidden_size) != (new.shape.vocab_size, new.shape.hidden_size):
        return 0
    both_V = old.t2d & new.t2d
    new.lm_head.weight[_head_rows(new)[both_V]] = old.lm_head.weight[_head_rows(old)[both_V]].to(
        new.lm_head.weight.dtype
    )
    return int(both_V.sum())


def _head_rows(draft: EagleDraft) -> Tensor:
    """Return [V]: the row of the head for each target token that the draft has; kept ids are ascending."""
    return draft.t2d.cumsum(0) - 1
