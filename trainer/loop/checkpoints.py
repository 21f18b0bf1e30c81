"""Checkpoints: the exact state from which a training resumes after a restart.

A checkpoint is a folder with ``state.json`` and the tensors of ``torch.distributed.checkpoint`` in safetensors files,
one for each process. Tensors are copied before they are written from another thread, so training continues. A folder is
written under another name and then renamed: a folder with a checkpoint's name is complete. The newest checkpoints are
kept, and the one that ``good.json`` names: the divergence guard found it good, and training rolls back to it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Generic, TypeVar, cast

import structlog
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from schemas.atomic_file import atomic_write
from trainer.data.data_loader import DataLoaderState

log = structlog.get_logger()

# One process is no mistake here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

KEPT = 2
_STATE, _GOOD, _PREFIX, _UNFINISHED = "state.json", "good.json", "step-", ".unfinished"
_STEP = TypeAdapter(int)


class CheckpointState(BaseModel):
    """What every checkpoint states."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    files: Mapping[str, int] = {}
    """Bytes of each file with tensors."""


class TrainState(CheckpointState):
    """The state of a training, without tensors."""

    tokens_seen: int
    self_generated_tokens: int = 0
    """Tokens of generated samples that were trained on beside them."""
    paused_s: float = 0.0
    """Seconds without traffic, which bound the self-generation of one pause."""
    parent: str
    """Version that the weights descend from: the one registered last, or the one that training started with."""
    lineage: str = ""
    """Of the weights: see ``TrainingLineage.id``."""
    warm_started: bool = False
    """Whether training began with a trained draft."""
    data_loader: DataLoaderState


StateT = TypeVar("StateT", bound=CheckpointState)
Save = Callable[[Path], Future[None]]
"""Copies the tensors of all processes and writes them to a folder; the future ends when they are written."""


class Checkpoints(Generic[StateT]):
    """The checkpoints of one training, below a folder. One is written at a time."""

    def __init__(self, folder: Path, state_type: type[StateT]) -> None:
        self._folder = folder
        self._state_type = state_type
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[StateT] | None = None
        """The checkpoint that is written, until ``take_written``."""

    def write(self, state: StateT, save: Save, *, good: bool = False) -> None:
        """Begin to write a checkpoint, after the one before; when it is written, remove old ones.

        Args:
            state: The state without tensors.
            save: Writes the tensors of that state.
            good: Whether training may roll back to it.

        Raises:
            OSError: this checkpoint or the one before cannot be written.
        """
        self.take_written()
        unfinished = self._folder / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self.writing = self._thread.submit(self._finish, state, save(unfinished), good=good)

    def take_written(self) -> StateT | None:
        """Wait until the checkpoint that is written is complete, and return its state; None if none is written.

        Raises:
            OSError: it cannot be written; the ones before are unchanged.
        """
        writing, self.writing = self.writing, None
        return writing.result() if writing else None

    def mark_good(self, step: int) -> None:
        """Let training roll back to the checkpoint of a step.

        Raises:
            OSError: the mark cannot be written.
        """
        atomic_write(self._folder / _GOOD, str(step))
        self._remove_old()

    def update(self, state: StateT) -> None:
        """Replace the state of a written checkpoint, whose tensors stay; do nothing if it was removed.

        Raises:
            OSError: it cannot be written.
        """
        folder = self._folder / _folder_name(state.step)
        if folder.exists():
            atomic_write(folder / _STATE, state.model_dump_json())

    def read_newest(self) -> tuple[StateT, Path] | None:
        """Return state and folder of the newest readable checkpoint; None if there is none."""
        return next(self._read(), None)

    def read_good(self) -> tuple[StateT, Path] | None:
        """Return state and folder of the good checkpoint, after the one that is written; None if there is none."""
        if self.writing:
            wait([self.writing])  # it may replace the good one
        step = self._read_good_step()
        return next((found for found in self._read() if found[0].step == step), None)

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, so that no restart resumes from them."""
        for folder in self._list_folders():
            if folder.name > _folder_name(step):
                shutil.rmtree(folder)

    def _finish(self, state: StateT, saving: Future[None], *, good: bool) -> StateT:
        saving.result()
        unfinished, final = self._folder / _UNFINISHED, self._folder / _folder_name(state.step)
        state = state.model_copy(update={"files": {file.name: file.stat().st_size for file in unfinished.iterdir()}})
        atomic_write(unfinished / _STATE, state.model_dump_json())
        _fsync(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _fsync(self._folder)
        if good:
            self.mark_good(state.step)
        self._remove_old()
        return state

    def _remove_old(self) -> None:
        good = self._read_good_step()
        for folder in self._list_folders()[:-KEPT]:
            if good is None or folder.name != _folder_name(good):
                shutil.rmtree(folder)

    def _read(self) -> Iterator[tuple[StateT, Path]]:
        for folder in reversed(self._list_folders()):
            try:
                state = self._state_type.model_validate_json((folder / _STATE).read_text())
                damaged = [name for name, size in state.files.items() if (folder / name).stat().st_size != size]
            except (OSError, ValidationError) as error:
                log.warning("checkpoint_unreadable", folder=str(folder), error=str(error))
                continue
            if damaged:
                log.warning("checkpoint_unreadable", folder=str(folder), error=f"{damaged} have another size")
            else:
                yield state, folder

    def _read_good_step(self) -> int | None:
        try:
            return _STEP.validate_json((self._folder / _GOOD).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("checkpoint_unreadable", file=str(self._folder / _GOOD), error=str(error))
            return None

    def _list_folders(self) -> list[Path]:
        return sorted(self._folder.glob(f"{_PREFIX}*"))


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, group: ProcessGroup | None = None) -> Future[None]:
    """Copy tensors, whole or sharded, and write them to a folder from another thread.

    Args:
        tensors: Of this process; they may change when the function has returned.
        folder: The same for all processes.
        group: A CPU group for this purpose alone, on all processes of which the function is called; each writes its
            shards, and a share of the whole tensors. None writes everything.

    Returns:
        Ends when all processes have written; with an ``OSError`` if one of them cannot.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    saving = cast(
        "Future[object]", async_save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    )
    saved: Future[None] = Future()

    def end(_: object) -> None:
        error = saving.exception()
        if error is None:
            saved.set_result(None)
        else:
            saved.set_exception(_as_os_error(folder, error))

    saving.add_done_callback(end)
    return saved


def load_tensors(
    folder: Path, prefixes: tuple[str, ...] = ("",), layout: Callable[[str], Tensor | None] = lambda _: None
) -> dict[str, Tensor]:
    """Return tensors of a checkpoint by name, whatever number of processes wrote them.

    Args:
        folder: The checkpoint.
        prefixes: Beginnings of the names to load.
        layout: Returns a tensor whose device and sharding a loaded one gets if it has the same shape; None loads it
            whole into memory.

    Raises:
        OSError: a file cannot be read.
    """
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    try:
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and name.startswith(prefixes):
                like, dtype = layout(name), stored.properties.dtype
                if like is not None and like.shape == stored.size:
                    tensors[name] = torch.empty_like(like, dtype=dtype)
                else:
                    tensors[name] = torch.empty(stored.size, dtype=dtype)
        load(tensors, storage_reader=reader, no_dist=True)
    except SafetensorError as error:
        raise OSError(f"train.checkpoint_dir: {folder}: {error}") from error
    except CheckpointException as error:
        raise _as_os_error(folder, error) from error
    return tensors


def _as_os_error(folder: Path, error: BaseException) -> BaseException:
    """Return an error of ``torch.distributed.checkpoint``, whose own class no handler of errors expects."""
    if not isinstance(error, CheckpointException):
        return error
    reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return OSError(f"train.checkpoint_dir: {folder}: {reasons}")


def _folder_name(step: int) -> str:
    return f"{_PREFIX}{step:010d}"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
