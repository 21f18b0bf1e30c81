"""Registers the weights in training as versions, when the held-out set says that they are worth it."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

import structlog
import torch
from pydantic import ValidationError

from schemas.events import QUARANTINED_TAG
from schemas.settings import DAY_0, Settings, SettingsError
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from trainer.data.samples import Window, collate, of_like_length
from trainer.data.target import Target
from trainer.loop.divergence_guard import Health
from trainer.loop.learner import products
from trainer.loop.warm_start import carry_over
from trainer.objective.losses import ttt_loss
from trainer.objective.simulated_acceptance import Accepted, added_up, by_window
from trainer.release.card import SETTINGS_TAG, card, shaping
from trainer.release.gate import HeldOut, OnLabel, worth_registering
from trainer.release.registry import SpeculatorRegistry

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Examined:
    """A draft on the held-out set."""

    health: Health
    accepted: Mapping[Window, Accepted]
    """Of each window."""


@dataclass(slots=True)
class _Version:
    """A version that others are compared with."""

    draft: EagleDraft
    accepted: dict[Window, Accepted] = field(default_factory=dict)
    """Of windows that it was scored on: most of a slice are those of the slice before."""


class Candidates:
    """Versions of one line as the trainer sees them: what is champion, what was registered last, what comes next."""

    def __init__(self, settings: Settings, target: Target, registry: SpeculatorRegistry) -> None:
        self._settings = settings
        self._target = target
        self._registry = registry
        self._versions: dict[str | None, _Version] = {}

    def champion(self) -> tuple[str, EagleDraft]:
        """Version and weights that nodes serve.

        Raises:
            RegistryError: no answer.
            CheckpointError: the registry's files are not what was registered.
        """
        version = self._registry.aliases(self._target.line).get("champion")
        return version or self._settings.speculator.day_0, self._version(version).draft

    def beginning(self) -> tuple[str, EagleDraft]:
        """Version and weights that training begins with, as ``train.warm_start`` says.

        Raises:
            SettingsError: a folder that holds no draft of this line.
            RegistryError: no answer.
            CheckpointError: the registry's files are not what was registered.
        """
        start = self._settings.train.warm_start
        if start == "alias":
            return self._by_alias()
        if start == DAY_0:
            return self._settings.speculator.day_0, self._target.day_0
        if start.isdecimal():
            return start, self._version(start).draft
        try:
            return start, checkpoint.read(Path(start), self._target.line)
        except CheckpointError as error:
            raise SettingsError(f"train.warm_start: {error}") from error

    def _by_alias(self) -> tuple[str, EagleDraft]:
        """The champion; for a line without one, what fits of the champion of ``train.parent_line``, named LINE/VERSION;
        else the draft of day 0."""
        version, draft = self.champion()
        parent_line = self._settings.train.parent_line
        if version != self._settings.speculator.day_0 or not parent_line:
            return version, draft
        parent = self._registry.aliases(parent_line).get("champion")
        if parent is None:
            log.warning("no_warm_start", parent_line=parent_line, why="no such line, or it has no champion")
            return version, draft
        begun = self._target.new_draft()
        carried = carry_over(self._download(parent_line, parent), begun)
        log.info("warm_start", parent_line=parent_line, version=parent, carried=str(carried))
        return (f"{parent_line}/{parent}", begun) if carried.tensors else (version, draft)

    def examine(self, draft: EagleDraft, windows: Sequence[Window]) -> Examined:
        """Loss of the accepted term, and accepted tokens per step of chains as long as a node drafts, over windows."""
        accepted = dict(zip(windows, self._accepted(draft, windows), strict=True))
        return Examined(Health(loss=self._loss(draft, windows), accepted_per_step=_length(accepted, windows)), accepted)

    def offer(
        self,
        draft: EagleDraft,
        examined: Examined,
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
    ) -> str | None:
        """Register the draft and make it candidate, if it is better than what was registered last.

        Args:
            draft: The weights in training.
            examined: The same weights on the held-out set.
            tags: What the version came from.
            metrics: Figures of the training.

        Returns:
            The new version; None if it is not worth one, or too few windows are there to tell.

        Raises:
            RegistryError: no answer; the next offer tries again.
            CheckpointError: the registry's files are not what was registered.
        """
        windows, score = list(examined.accepted), examined.health.accepted_per_step
        if len(windows) < self._settings.promoter.gate_min_samples:
            return None
        line = self._target.line
        aliases = self._registry.aliases(line)
        champion, candidate = aliases.get("champion"), aliases.get("candidate")
        self._versions = {name: known for name, known in self._versions.items() if name in (champion, candidate)}
        of_champion = self._of(champion, windows)
        to_beat, last = _length(of_champion, windows), None
        if candidate is not None and self._can_be_promoted(candidate, champion):
            last = _length(self._of(candidate, windows), windows)
        if not worth_registering(score, to_beat, last):
            return None
        held_out = HeldOut(
            accepted_per_step=score,
            champion=champion or self._settings.speculator.day_0,
            champion_accepted_per_step=to_beat,
            windows=len(windows),
            labels=self._by_label(examined.accepted, of_champion),
        )
        figures = {"accepted_per_step": score, **metrics}
        tags = {
            **tags,
            "line": line,
            "target": self._target.fingerprint,
            "code": code_revision(),
            "metrics": json.dumps(figures),
            "held_out": held_out.model_dump_json(),
            SETTINGS_TAG: shaping(self._settings),
        }
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.write(draft, Path(folder), self._target.fingerprint)
            described = card(self._settings, draft.shape, tags, figures)
            version = self._registry.register(line, Path(folder), tags, figures, described)
        self._registry.point(line, "candidate", version)
        log.info("registered", version=version, **held_out.model_dump())
        return version

    def _of(self, version: str | None, windows: Sequence[Window]) -> Mapping[Window, Accepted]:
        """What a version has on each window; of None, the draft of day 0."""
        known = self._version(version)
        missing = [window for window in windows if window not in known.accepted]
        found = known.accepted | dict(zip(missing, self._accepted(known.draft, missing), strict=True))
        known.accepted = {window: found[window] for window in windows}
        return known.accepted

    def _accepted(self, draft: EagleDraft, windows: Sequence[Window]) -> list[Accepted]:
        embeddings_VH, lookahead = self._target.embeddings_VH, self._settings.serve.num_speculative_tokens
        with products(self._settings.train, embeddings_VH.device):
            return by_window(draft, embeddings_VH, windows, lookahead)

    @torch.no_grad()
    def _loss(self, draft: EagleDraft, windows: Sequence[Window]) -> float | None:
        """Of the accepted term; None where it is not finite."""
        train = self._settings.train.model_copy(
            update={"rejected_weight": 0.0, "rejection_weight": 0.0, "policy_weight": 0.0}
        )
        embeddings_VH = self._target.embeddings_VH
        draft = draft.to(embeddings_VH.device)
        batches = map(collate, of_like_length(windows))
        with products(train, embeddings_VH.device):
            losses = [ttt_loss(draft, embeddings_VH, batch.to(embeddings_VH.device), train) for batch in batches]
        loss = sum(part.accepted * part.positions for part in losses) / max(sum(part.positions for part in losses), 1)
        return loss if math.isfinite(loss) else None

    def _by_label(
        self, accepted: Mapping[Window, Accepted], of_champion: Mapping[Window, Accepted]
    ) -> tuple[OnLabel, ...]:
        """Both on each label; those with too few windows together."""
        return tuple(
            OnLabel(
                label=label,
                accepted_per_step=_length(accepted, chosen),
                champion_accepted_per_step=_length(of_champion, chosen),
                windows=len(chosen),
            )
            for label, chosen in by_label(list(accepted), self._settings.promoter.gate_label_min_samples).items()
        )

    def _can_be_promoted(self, candidate: str, champion: str | None) -> bool:
        """Whether it is champion, or its figures are against today's; else the promoter waits for another."""
        if candidate == champion:
            return True
        gate, tags = self._settings.promoter, self._registry.tags(self._target.line, candidate)
        try:
            held_out = HeldOut.of(tags)
        except ValidationError:
            return False
        lost = held_out.lost(gate.gate_label_margin, gate.gate_label_min_samples)
        return held_out.is_against(champion) and lost is None and QUARANTINED_TAG not in tags

    def _version(self, version: str | None) -> _Version:
        if version not in self._versions:
            draft = self._target.day_0 if version is None else self._download(self._target.line, version)
            self._versions[version] = _Version(draft)
        return self._versions[version]

    def _download(self, line: str, version: str) -> EagleDraft:
        with tempfile.TemporaryDirectory() as folder:
            return checkpoint.read(self._registry.download(line, version, Path(folder)), line)


def _length(accepted: Mapping[Window, Accepted], windows: Sequence[Window]) -> float:
    """Accepted tokens per step over windows."""
    return added_up(accepted[window] for window in windows).length


def by_label(windows: Sequence[Window], least: int) -> dict[str | None, list[Window]]:
    """Windows by label, the empty one for those without; under None all of labels that have fewer than ``least``."""
    found: dict[str, list[Window]] = {}
    for window in windows:
        found.setdefault(window.label or "", []).append(window)
    told: dict[str | None, list[Window]] = {label: ws for label, ws in found.items() if len(ws) >= least}
    rest = [window for ws in found.values() if len(ws) < least for window in ws]
    return told | {None: rest} if rest else told


@cache
def code_revision() -> str:
    """Git revision of this checkout, or the version of the installed package."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return metadata.version("aurora-stream")
    return answer.stdout.strip()
