"""The trainer's own checkpoints: everything that training goes on from after a restart, exactly.

A checkpoint is a folder with ``state.safetensors`` (weights and optimizer state) and ``state.json`` (everything else).
It is written beside its place and renamed there, so one that has its name is whole. The newest ones are kept, and the
newest of those that scored well on the held-out set: that is where training goes back to when it has gone wrong.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.data.feed import FeedState
from trainer.loop.divergence_guard import Health

log = structlog.get_logger()

KEPT = 2
_TENSORS, _STATE, _PREFIX, _UNFINISHED = "state.safetensors", "state.json", "step-", ".unfinished"


class TrainState(BaseModel):
    """Where training stands, apart from tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    line: str
    step: int
    tokens_seen: int
    parent: str
    """Version that the weights grew from: the one registered last, or the one that training began with."""
    feed: FeedState
    good: bool = False
    """Whether training may go back to it."""
    health: Health | None = None
    """What it scored; None before the first comparison."""


class Checkpoints:
    """Checkpoints of one line below ``folder``."""

    def __init__(self, folder: Path, line: str) -> None:
        self._folder = folder / line
        self._line = line

    def write(self, state: TrainState, tensors: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint, then remove those that are older than the newest ones."""
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._folder / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, unfinished / _TENSORS)
        (unfinished / _STATE).write_text(state.model_dump_json())
        for name in (_TENSORS, _STATE):
            _flush(unfinished / name)
        final = self._folder / _name(state.step)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _flush(self._folder)
        self._remove_old()
        return final

    def newest(self) -> tuple[TrainState, dict[str, Tensor]] | None:
        """The newest checkpoint that can be read; None where there is none."""
        return next(self._read(only_good=False), None)

    def good(self) -> tuple[TrainState, dict[str, Tensor]] | None:
        """The newest one that scored well and can be read; None where there is none."""
        return next(self._read(only_good=True), None)

    def remove_after(self, step: int) -> None:
        """Remove those of later steps, so that no restart goes on from them."""
        for folder in self._all():
            if folder.name > _name(step):
                shutil.rmtree(folder)

    def _remove_old(self) -> None:
        folders = self._all()
        states = ((folder, self._state(folder)) for folder in reversed(folders))
        good = next((folder for folder, state in states if state and state.good), None)
        for folder in folders[:-KEPT]:
            if folder != good:
                shutil.rmtree(folder)

    def _read(self, *, only_good: bool) -> Iterator[tuple[TrainState, dict[str, Tensor]]]:
        for folder in reversed(self._all()):
            state = self._state(folder)
            if state is None or (only_good and not state.good):
                continue
            try:
                yield state, load_file(folder / _TENSORS)
            except (OSError, SafetensorError) as error:
                log.warning("checkpoint_unreadable", folder=str(folder), error=str(error))

    def _state(self, folder: Path) -> TrainState | None:
        """Of this line, where it can be read."""
        try:
            state = TrainState.model_validate_json((folder / _STATE).read_text())
        except (OSError, ValidationError) as error:
            log.warning("checkpoint_unreadable", folder=str(folder), error=str(error))
            return None
        return state if state.line == self._line else None

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob(f"{_PREFIX}*"))


def _name(step: int) -> str:
    return f"{_PREFIX}{step:010d}"


def _flush(path: Path) -> None:
    """Bring a file or a folder's entries onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
