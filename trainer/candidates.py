"""Registers the weights in training as versions, when the held-back slice says that they are worth it."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import structlog
import torch
from pydantic import ValidationError

from schemas.events import QUARANTINED_TAG
from schemas.settings import Settings, SettingsError
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from trainer.card import SETTINGS_TAG, card, shaping
from trainer.gate import DAY_0, HeldBack, OnLabel, worth_registering
from trainer.guard import Health
from trainer.lookahead import accept_length
from trainer.losses import ttt_loss
from trainer.registry import SpeculatorRegistry
from trainer.target import Target
from trainer.warm_start import carry_over
from trainer.windows import Window, collate

log = structlog.get_logger()

_WINDOWS_PER_BATCH = 8


class Candidates:
    """Versions of one line as the trainer sees them: what is champion, what was registered last, what comes next."""

    def __init__(self, settings: Settings, target: Target, registry: SpeculatorRegistry) -> None:
        self._settings = settings
        self._target = target
        self._registry = registry
        self._drafts: dict[str, EagleDraft] = {}

    @property
    def day_0(self) -> str:
        """Version string of the draft of day 0, which nodes begin with."""
        return f"{DAY_0}-{self._settings.speculator.seed}"

    def champion(self) -> tuple[str, EagleDraft]:
        """Version and weights that nodes serve.

        Raises:
            RegistryError: no answer.
            CheckpointError: the registry's files are not what was registered.
        """
        version = self._registry.aliases(self._target.line).get("champion")
        return version or self.day_0, self._draft(version)

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
        if start == "random":
            return self.day_0, self._target.day_0
        if start.isdecimal():
            return start, self._draft(start)
        try:
            return start, checkpoint.read(Path(start), self._target.line)
        except CheckpointError as error:
            raise SettingsError(f"train.warm_start: {error}") from error

    def _by_alias(self) -> tuple[str, EagleDraft]:
        """The champion; for a line without one, what fits of the champion of ``train.parent_line``, named LINE/VERSION;
        else the draft of day 0."""
        version, draft = self.champion()
        parent_line = self._settings.train.parent_line
        if version != self.day_0 or not parent_line:
            return version, draft
        parent = self._registry.aliases(parent_line).get("champion")
        if parent is None:
            log.warning("no_warm_start", parent_line=parent_line, why="no such line, or it has no champion")
            return version, draft
        begun = self._target.new_draft()
        carried = carry_over(self._download(parent_line, parent), begun)
        log.info("warm_start", parent_line=parent_line, version=parent, carried=str(carried))
        return (f"{parent_line}/{parent}", begun) if carried.tensors else (version, draft)

    @torch.no_grad()
    def health(self, draft: EagleDraft, windows: Sequence[Window]) -> Health:
        """Loss of the accepted term and accept length over windows."""
        train = self._settings.train.model_copy(
            update={"rejected_weight": 0.0, "rejection_weight": 0.0, "policy_weight": 0.0}
        )
        by_length, embeddings_VH = sorted(windows, key=len), self._target.embeddings_VH
        draft = draft.to(embeddings_VH.device)
        batches = (collate(by_length[i : i + _WINDOWS_PER_BATCH]) for i in range(0, len(windows), _WINDOWS_PER_BATCH))
        losses = [ttt_loss(draft, embeddings_VH, batch.to(embeddings_VH.device), train) for batch in batches]
        loss = sum(part.accepted * part.positions for part in losses) / max(sum(part.positions for part in losses), 1)
        return Health(loss=loss if math.isfinite(loss) else None, accept_length=self.score(draft, windows))

    def score(self, draft: EagleDraft, windows: Sequence[Window]) -> float:
        """Simulated accept length over windows, for chains as long as a node drafts; bonus excluded."""
        return accept_length(draft, self._target.embeddings_VH, windows, self._settings.serve.draft_tokens).length

    def offer(
        self,
        draft: EagleDraft,
        score: float,
        windows: Sequence[Window],
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
    ) -> str | None:
        """Register the draft and make it candidate, if it is better than what was registered last.

        Args:
            draft: The weights in training.
            score: Their accept length on ``windows``.
            windows: The held-back slice.
            tags: What the version came from.
            metrics: Figures of the training.

        Returns:
            The new version; None if it is not worth one, or too few windows are there to tell.

        Raises:
            RegistryError: no answer; the next offer tries again.
            CheckpointError: the registry's files are not what was registered.
        """
        if len(windows) < self._settings.promoter.min_windows:
            return None
        line = self._target.line
        aliases = self._registry.aliases(line)
        champion, candidate = aliases.get("champion"), aliases.get("candidate")
        to_beat = self.score(self._draft(champion), windows)
        last = None
        if candidate is not None and self._can_be_promoted(candidate, champion):
            last = self.score(self._draft(candidate), windows)
        self._drafts = {v: d for v, d in self._drafts.items() if v in (champion, candidate)}
        if not worth_registering(score, to_beat, last):
            return None
        held_back = HeldBack(
            accept_length=score,
            champion=champion or self.day_0,
            champion_accept_length=to_beat,
            windows=len(windows),
            labels=self._by_label(draft, self._draft(champion), windows),
        )
        figures = {"accept_length": score, **metrics}
        tags = {
            **tags,
            "line": line,
            "target": self._target.fingerprint,
            "code": code_revision(),
            "metrics": json.dumps(figures),
            "held_back": held_back.model_dump_json(),
            SETTINGS_TAG: shaping(self._settings),
        }
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.write(draft, Path(folder), self._target.fingerprint)
            described = card(self._settings, draft.shape, tags, figures)
            version = self._registry.register(line, Path(folder), tags, figures, described)
        self._registry.point(line, "candidate", version)
        log.info("registered", version=version, **held_back.model_dump())
        return version

    def _by_label(self, draft: EagleDraft, champion: EagleDraft, windows: Sequence[Window]) -> tuple[OnLabel, ...]:
        """Both scored on each label; those with too few windows together."""
        return tuple(
            OnLabel(
                label=label,
                accept_length=self.score(draft, chosen),
                champion_accept_length=self.score(champion, chosen),
                windows=len(chosen),
            )
            for label, chosen in by_label(windows, self._settings.promoter.label_windows).items()
        )

    def _can_be_promoted(self, candidate: str, champion: str | None) -> bool:
        """Whether it is champion, or its figures are against today's; else the promoter waits for another."""
        if candidate == champion:
            return True
        gate, tags = self._settings.promoter, self._registry.tags(self._target.line, candidate)
        try:
            held_back = HeldBack.of(tags)
        except ValidationError:
            return False
        lost = held_back.lost(gate.label_margin, gate.label_windows)
        return held_back.is_against(champion) and lost is None and QUARANTINED_TAG not in tags

    def _draft(self, version: str | None) -> EagleDraft:
        if version is None:
            return self._target.day_0
        if version not in self._drafts:
            self._drafts[version] = self._download(self._target.line, version)
        return self._drafts[version]

    def _download(self, line: str, version: str) -> EagleDraft:
        with tempfile.TemporaryDirectory() as folder:
            return checkpoint.read(self._registry.download(line, version, Path(folder)), line)


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
