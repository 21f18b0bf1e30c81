"""The fingerprint of a target: a hash over its files, each of which is read only when it has changed.

A process needs the fingerprint at its start, and a target of 70B parameters has 140 GB. The hashes of files are kept
in a cache, by path, size, times and inode.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from schemas.atomic_file import atomic_write
from schemas.speculator.checkpoint import CheckpointError, hash_file

log = structlog.get_logger()

SETTLED_S = 2.0
"""Age of a file's last change from which its hash is kept. A file system's clock may be as coarse: a younger file can
change again without a visible difference."""


class FileHash(BaseModel):
    """The hash of a file, and what ``stat`` returned before the file was read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    mtime_ns: int
    ctime_ns: int
    """Unlike the time of modification, a copying tool cannot set it."""
    inode: int
    sha256: str

    def is_of(self, stat: os.stat_result) -> bool:
        """Return whether the file is unchanged."""
        known = (self.size, self.mtime_ns, self.ctime_ns, self.inode)
        return known == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


_CACHE = TypeAdapter(dict[str, FileHash])


def target_fingerprint(folder: Path, cache: str = "") -> str:
    """Return the fingerprint of a target, a hash over all bytes of its configuration and weights.

    Args:
        folder: The target.
        cache: File with the hashes of unchanged files, as ``target.fingerprint_cache`` names it; empty reads all files.

    Raises:
        CheckpointError: the folder has no configuration or no safetensors weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    config = folder / "config.json"
    if not weights or not config.exists():
        raise CheckpointError(f"{folder}: no config.json with *.safetensors; set target.path to a model folder")
    known, digest, added = _read_cache(cache), hashlib.sha256(), dict[str, FileHash]()
    for path in (file.resolve() for file in (config, *weights)):
        found, stat = known.get(str(path)), path.stat()
        if found is None or not found.is_of(stat):
            is_settled = stat.st_ctime < time.time() - SETTLED_S
            found = FileHash(
                size=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
                ctime_ns=stat.st_ctime_ns,
                inode=stat.st_ino,
                sha256=hash_file(path),
            )
            added |= {str(path): found} if is_settled else {}
        digest.update(bytes.fromhex(found.sha256))
    if cache and added:
        _add_to_cache(Path(cache), added)
    return digest.hexdigest()[:32]


def _read_cache(cache: str) -> dict[str, FileHash]:
    try:
        return _CACHE.validate_json(Path(cache).read_bytes()) if cache and Path(cache).exists() else {}
    except (OSError, ValidationError) as error:
        log.warning("fingerprint_cache_unreadable", file=cache, error=str(error))
        return {}


def _add_to_cache(cache: Path, added: dict[str, FileHash]) -> None:
    """Add hashes; of two processes that add at the same time, one may lose its own, and hashes again at its start."""
    kept = {path: found for path, found in _read_cache(str(cache)).items() if Path(path).exists()}
    try:
        atomic_write(cache, _CACHE.dump_json(kept | added, indent=1) + b"\n")
    except OSError as error:
        log.warning("fingerprint_cache_unwritable", setting="target.fingerprint_cache", error=str(error))
