"""Checkpoints: the exact state from which a training resumes after a restart.

A checkpoint is a folder with ``state.safetensors`` (weights and optimizer state) and ``state.json`` (everything else).
It is written under another name and then renamed, so a folder with a checkpoint's name is complete. The newest
checkpoints are kept, and the newest good one: the divergence guard found it good, and training rolls back to it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.data.data_loader import DataLoaderState

log = structlog.get_logger()

KEPT = 2
_TENSORS, _STATE, _PREFIX, _UNFINISHED = "state.safetensors", "state.json", "step-", ".unfinished"


class CheckpointState(BaseModel):
    """What every checkpoint states."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    good: bool = False
    """Whether training may roll back to it."""


class TrainState(CheckpointState):
    """The state of a training, without tensors."""

    tokens_seen: int
    parent: str
    """Version that the weights descend from: the one registered last, or the one that training started with."""
    warm_started: bool = False
    """Whether training began with a trained draft."""
    data_loader: DataLoaderState


StateT = TypeVar("StateT", bound=CheckpointState)


class Checkpoints(Generic[StateT]):
    """The checkpoints of one training, below a folder."""

    def __init__(self, folder: Path, state_type: type[StateT]) -> None:
        self._folder = folder
        self._state_type = state_type

    def write(self, state: StateT, tensors: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint, then remove old ones."""
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._folder / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, unfinished / _TENSORS)
        (unfinished / _STATE).write_text(state.model_dump_json())
        for name in (_TENSORS, _STATE):
            _fsync(unfinished / name)
        final = self._folder / _folder_name(state.step)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _fsync(self._folder)
        self._remove_old()
        return final

    def read_newest(self) -> tuple[StateT, dict[str, Tensor]] | None:
        """Return the newest readable checkpoint; None if there is none."""
        return next(self._read(only_good=False), None)

    def read_good(self) -> tuple[StateT, dict[str, Tensor]] | None:
        """Return the newest readable good checkpoint; None if there is none."""
        return next(self._read(only_good=True), None)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, so that no restart resumes from them."""
        for folder in self._list_folders():
            if folder.name > _folder_name(step):
                shutil.rmtree(folder)

    def _remove_old(self) -> None:
        folders = self._list_folders()
        states = ((folder, self._read_state(folder)) for folder in reversed(folders))
        good = next((folder for folder, state in states if state and state.good), None)
        for folder in folders[:-KEPT]:
            if folder != good:
                shutil.rmtree(folder)

    def _read(self, *, only_good: bool) -> Iterator[tuple[StateT, dict[str, Tensor]]]:
        for folder in reversed(self._list_folders()):
            state = self._read_state(folder)
            if state is None or (only_good and not state.good):
                continue
            try:
                yield state, load_file(folder / _TENSORS)
            except (OSError, SafetensorError) as error:
                log.warning("checkpoint_unreadable", folder=str(folder), error=str(error))

    def _read_state(self, folder: Path) -> StateT | None:
        try:
            return self._state_type.model_validate_json((folder / _STATE).read_text())
        except (OSError, ValidationError) as error:
            log.warning("checkpoint_unreadable", folder=str(folder), error=str(error))
            return None

    def _list_folders(self) -> list[Path]:
        return sorted(self._folder.glob(f"{_PREFIX}*"))


def _folder_name(step: int) -> str:
    return f"{_PREFIX}{step:010d}"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
