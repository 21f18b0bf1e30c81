"""Files that hold the features of samples which do not fit into memory, one file for each sample.

They are a cache of the tables: one process writes them, and deletes those of an earlier process at its start. With
several ranks, the others read the features of their own samples here.
"""

from __future__ import annotations

import ctypes
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import structlog
import torch

from schemas.errors import UserError
from schemas.settings import Train
from trainer.data.samples import Sample, StoredFeatures

log = structlog.get_logger()

_SUFFIX = ".features"


class FeatureFileError(UserError):
    """A file with features cannot be read."""


class FeatureFiles:
    """The files of one process.

    Args:
        folder: Of this process alone; it is created with the first file.
        kept_steps: Number of further steps in which a file that was removed can still be read.
    """

    def __init__(self, folder: Path, kept_steps: int = 0) -> None:
        self._folder = folder
        self._kept_steps = kept_steps
        self._removed: deque[list[StoredFeatures]] = deque([[]])
        """By step, the current one last."""
        self._number = 0
        self._stored = 0
        """Files written in this step."""
        self._is_failing = False
        self.clear()

    def store(self, sample: Sample) -> Sample:
        """Return the sample with its features in a file; as it is if it has none, or if the file cannot be written."""
        if not sample.has_features:
            return sample
        self._number += 1
        path = self._folder / f"{self._number:012d}{_SUFFIX}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Text can be guessed from hidden states.
            path.touch(mode=0o600)
            path.write_bytes(sample.features.contiguous().view(torch.uint8).numpy().data)
        except OSError as error:
            with suppress(OSError):
                path.unlink()
            self._report_failure(error)
            return sample
        self._is_failing = False
        self._stored += 1
        stored = StoredFeatures(str(path), *sample.features.shape)
        return replace(sample, features=sample.features.new_empty(0, stored.width), stored=stored)

    def remove(self, stored: StoredFeatures) -> None:
        """Mark a file to be deleted at the end of the step, or ``kept_steps`` later."""
        self._removed[-1].append(stored)

    def end_step(self) -> None:
        """Delete the files that are not read any more, and return the memory of stored features to the system."""
        if self._stored:
            _trim_heap()
        self._stored = 0
        self._removed.append([])
        while len(self._removed) > self._kept_steps + 1:
            for stored in self._removed.popleft():
                Path(stored.path).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all files, those of an earlier process too."""
        for file in self._folder.glob(f"*{_SUFFIX}"):
            file.unlink()

    def _report_failure(self, error: OSError) -> None:
        if not self._is_failing:
            log.error(
                "features_not_stored",
                folder=str(self._folder),
                error=str(error),
                setting="train.spill_dir",
                effect="samples that do not fit into train.replay_memory_bytes are not replayed",
            )
        self._is_failing = True


def load_features(sample: Sample) -> Sample:
    """Return the sample with the features of its file; as it is if it has no file.

    Raises:
        FeatureFileError: the file cannot be read.
    """
    if (stored := sample.stored) is None:
        return sample
    try:
        numbers = np.fromfile(stored.path, dtype=np.int16)
    except OSError as error:
        raise FeatureFileError(f"{stored.path}: {error}; check train.spill_dir") from error
    if numbers.nbytes != stored.size:
        raise FeatureFileError(f"{stored.path} has {numbers.nbytes} bytes, not {stored.size}; check train.spill_dir")
    features = torch.from_numpy(numbers).view(torch.bfloat16).view(stored.rows, stored.width)
    return replace(sample, features=features, stored=None)


def _trim_heap() -> None:
    """Return freed memory to the system, where the C library can.

    glibc does not reuse the place of freed features for aligned ones of the same size while small tensors lie between
    them: without this, the process grows with every sample.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def spill_folder(settings: Train, line: str) -> Path:
    """Return the folder of a trainer's files."""
    return Path(settings.spill_dir or settings.checkpoint_dir) / line
