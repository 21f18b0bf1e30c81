"""Registers the weights in training as versions, when the held-back slice says that they are worth it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import structlog
from pydantic import ValidationError

from schemas.settings import Settings
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft
from trainer.gate import DAY_0, HeldBack, worth_registering
from trainer.lookahead import accept_length
from trainer.registry import SpeculatorRegistry
from trainer.target import Target
from trainer.windows import Window

log = structlog.get_logger()


class Candidates:
    """Versions of one line as the trainer sees them: what is champion, what was registered last, what comes next."""

    def __init__(self, settings: Settings, target: Target, registry: SpeculatorRegistry) -> None:
        self._settings = settings
        self._target = target
        self._registry = registry
        self._drafts: dict[str, EagleDraft] = {}

    @property
    def day_0(self) -> str:
        """Version string of the random draft that nodes begin with."""
        return f"{DAY_0}-{self._settings.speculator.seed}"

    def champion(self) -> tuple[str, EagleDraft]:
        """Version and weights that nodes serve.

        Raises:
            RegistryError: no answer.
            CheckpointError: the registry's files are not what was registered.
        """
        version = self._registry.aliases(self._target.line).get("champion")
        return version or self.day_0, self._draft(version)

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
        )
        figures = {"accept_length": score, **metrics}
        tags = {
            **tags,
            "line": line,
            "target": self._target.fingerprint,
            "code": code_revision(),
            "metrics": json.dumps(figures),
            "held_back": held_back.model_dump_json(),
        }
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.write(draft, Path(folder), self._target.fingerprint)
            version = self._registry.register(line, Path(folder), tags, figures)
        self._registry.point(line, "candidate", version)
        log.info("registered", version=version, **held_back.model_dump())
        return version

    def _can_be_promoted(self, candidate: str, champion: str | None) -> bool:
        """Whether it is champion, or its figures are against today's; else the promoter waits for another."""
        if candidate == champion:
            return True
        try:
            return HeldBack.of(self._registry.tags(self._target.line, candidate)).is_against(champion)
        except ValidationError:
            return False

    def _draft(self, version: str | None) -> EagleDraft:
        if version is None:
            return self._target.day_0
        if version not in self._drafts:
            with tempfile.TemporaryDirectory() as folder:
                files = self._registry.download(self._target.line, version, Path(folder))
                self._drafts[version] = checkpoint.read(files, self._target.line)
        return self._drafts[version]


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
