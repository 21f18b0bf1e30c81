"""Replaces the weights of a worker's draft between two steps.

vLLM's own layerwise reload copies new weights into the tensors that kernels and captured graphs use; on a CPU it also
packs them again. A thread reads and checks the files of a version, while steps continue. Then the weights are loaded
between two steps, and compared with those of the file. If anything fails, the weights before are loaded again.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from schemas.errors import UserError, describe_error
from schemas.speculator.checkpoint import (
    CONFIG,
    MANIFEST,
    CheckpointError,
    hash_file,
    read_checkpoint,
    read_manifest,
    read_shape,
)
from schemas.speculator.draft_folder import read_draft_folder
from schemas.speculator.layouts import Shard, fuse_tensors, shard_tensors
from schemas.speculator.network import EagleDraft

log = structlog.get_logger()

_TABLES = {"d2t": "draft_id_to_target_id", "t2d": ""}
"""The draft vocabulary, with vLLM's names."""


ATTACHED = "attached"
"""Version that drafts in a server that somebody else started with a draft that is no version of the line."""


@dataclass(frozen=True, slots=True, eq=False)
class HeldDraft:
    """The draft that a server has started with."""

    version: str
    line: str
    """Of the versions that may be loaded."""
    key_heads: int
    """Heads of keys and values."""
    tensors: Mapping[str, Tensor]
    """By their names in a version's file."""


class _Reading(threading.Thread):
    """Reads and checks the files of a version."""

    def __init__(self, folder: Path, line: str, digest: str) -> None:
        super().__init__(name="aurora-read-version", daemon=True)
        self.folder, self.line, self.digest = folder, line, digest
        self.tensors: Mapping[str, Tensor] = {}
        self.why: str | None = None
        self.start()

    def run(self) -> None:
        try:
            self.tensors = read_tensors(self.folder, self.line, self.digest)
        except (CheckpointError, OSError) as error:
            self.why = str(error)


class DraftReload:
    """The draft of one worker.

    Args:
        model: vLLM's draft model.
        reload: Loads tensors into it, by their names in a version's file.
        held: What it holds.
        shard: Part of each tensor that this worker holds, where tensor parallelism divides it.
    """

    def __init__(self, model: Any, reload: Any, held: HeldDraft, shard: Shard) -> None:
        self.version = held.version
        self._model, self._reload, self._shard = model, reload, shard
        self._line, self._key_heads, self._served = held.line, held.key_heads, held.tensors
        self._reading: _Reading | None = None

    def read(self, folder: Path, digest: str) -> bool:
        """Start to read a version on a thread; return whether it is read. Call it until it is.

        Args:
            folder: Of the version.
            digest: SHA-256 of its manifest.

        Raises:
            CheckpointError: the version is not valid.
        """
        reading = self._reading
        if reading is None or (reading.folder, reading.digest) != (folder, digest):
            self._reading = _Reading(folder, self._line, digest)
            return False
        if reading.is_alive():
            return False
        if reading.why:
            self._reading = None
            raise CheckpointError(reading.why)
        return True

    def load(self, version: str) -> float:
        """Load the version that was read; return the seconds that it took.

        Raises:
            UserError: it is not loaded; the message says whether the version before still serves.
        """
        reading, self._reading = self._reading, None
        if reading is None or reading.is_alive() or reading.why:
            raise UserError("no version has been read")
        start = time.perf_counter()
        if not _equal(reading.tensors, self._served):
            self._replace(reading.tensors)
        self.version, self._served = version, reading.tensors
        seconds = time.perf_counter() - start
        log.info("aurora_draft_loaded", version=version, seconds=round(seconds, 3))
        return seconds

    def _replace(self, tensors: Mapping[str, Tensor]) -> None:
        if (why := self._try(tensors)) is None:
            return
        log.warning("aurora_draft_not_loaded", why=why)
        if second := self._try(self._served):
            raise UserError(f"{why}; the version before could not be restored: {second}")
        raise UserError(f"{why}; version {self.version} still serves")

    def _try(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Load tensors; return why the server does not hold them."""
        try:
            self._reload(tensors)
            wrong = differing(self._model, tensors, self._key_heads, self._shard)
        except Exception as error:  # noqa: BLE001 - vLLM raises what it likes; the draft before must be restored
            return describe_error(error)
        return f"the server holds other weights than were loaded: {', '.join(wrong)}" if wrong else None


def read_held_draft(folder: Path, version: str) -> HeldDraft:
    """Return the version with which a server has started.

    Raises:
        CheckpointError: the folder contains no valid version.
    """
    line = read_manifest(folder).line
    tensors = read_tensors(folder, line, hash_file(folder / MANIFEST))
    return HeldDraft(version, line, read_shape(folder).num_key_value_heads, tensors)


def read_foreign_draft(own: Path, target: Path, folder: Path, version: str) -> HeldDraft:
    """Return the draft with which somebody else has started a server.

    Args:
        own: Folder of this draft.
        target: Folder of the target.
        folder: Of the version with which the line begins here.
        version: Its name, which the draft gets if it has the same weights.

    Raises:
        CheckpointError: one of the folders is not readable, or the draft has another shape than the line.
    """
    first = read_held_draft(folder, version)
    draft = read_draft_folder(own, target, json.loads((target / CONFIG).read_text())).draft
    if draft.shape != read_shape(folder):
        raise CheckpointError(
            f"{own}: the draft has another shape than line {first.line}: name this folder in speculator.day_0_folder"
        )
    tensors = _in_file_types(draft)
    return replace(first, version=version if _equal(tensors, first.tensors) else ATTACHED, tensors=tensors)


def read_tensors(folder: Path, line: str, digest: str) -> dict[str, Tensor]:
    """Return the tensors of a version's file after all checks, in the data type of the file.

    Raises:
        CheckpointError: a file is altered, or the version is another one than ``digest`` names.
    """
    if (found := hash_file(folder / MANIFEST)) != digest:
        raise CheckpointError(f"{folder / MANIFEST}: SHA-256 {found[:16]}… is not the expected {digest[:16]}…")
    return _in_file_types(read_checkpoint(folder, line))


def _in_file_types(draft: EagleDraft) -> dict[str, Tensor]:
    return {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in draft.state_dict().items()
    }


def differing(model: torch.nn.Module, tensors: Mapping[str, Tensor], key_heads: int, shard: Shard) -> list[str]:
    """Return the names of a model's tensors that hold other values than those of a file, or a rank's part of these.

    Tensors that a kernel has packed have another shape and are not compared.

    Args:
        model: vLLM's draft model.
        tensors: Of the file.
        key_heads: Heads of keys and values.
        shard: Part of each tensor that this worker holds.
    """
    own = {name: value for name, value in tensors.items() if name not in _TABLES}
    expected = fuse_tensors(shard_tensors(own, key_heads, shard)) | {_TABLES["d2t"]: tensors["d2t"]}
    held = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return [
        name
        for name, value in expected.items()
        if name in held and held[name].shape == value.shape and not held[name].cpu().equal(value.to(held[name].dtype))
    ]


def reload_layerwise(worker: Any, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into the draft of vLLM's ``Worker``."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_processing, initialize_layerwise_reload

    model = worker.model_runner.drafter.model
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        initialize_layerwise_reload(model)
        try:
            model.load_weights(tensors.items())
        finally:
            finalize_layerwise_processing(model, worker.speculative_config.draft_model_config)


def _equal(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(value.equal(others[name]) for name, value in tensors.items())
