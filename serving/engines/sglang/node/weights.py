"""Draft weights as SGLang's server takes and holds them, and the checksums of its ``/weights_checker``.

A checksum is over the bytes of a tensor in the dtype in which the server holds it. Its algorithm depends on the device:
on a CPU the start of a SHA-256, on a GPU a sum over tiles of mixed words that many threads can form at once. Neither
dtype nor device need to be known: a server holds a draft if its checksums equal those of the draft in one dtype, by one
algorithm.
"""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, multiprocessing

from schemas.speculator.layouts import Shard, fuse_tensors, shard_tensors
from schemas.speculator.network import EagleDraft

Words = npt.NDArray[np.uint32]
Checksums = Mapping[str, str]
ChecksumScheme = tuple[Callable[[Tensor], str], torch.dtype]
"""Algorithm, and the dtype in which the server holds a draft."""

DRAFT = "draft."
"""Prefix of a draft's tensors in the server's checksums."""
_READ_ONCE = ("d2t", "t2d")
"""Tensors that a server reads at its start only: a version with others is not swapped in."""

_TILE = 8192
"""Words that a GPU sums up together."""
_BLOCK = 256 * _TILE
"""Words that are mixed at once here, to bound memory."""
_SEEDS = (0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF)
_POSITIONS = ((0x27D4EB2D, 15), (0x165667B1, 13))


def draft_tensors(draft: EagleDraft) -> dict[str, Tensor]:
    """Return the tensors of an update: by their names in a version's file, in the dtype of that file."""
    return {
        name: value.detach().to(torch.bfloat16).cpu().contiguous()
        for name, value in draft.state_dict().items()
        if name not in _READ_ONCE
    }


def serialize(tensors: Mapping[str, Tensor]) -> str:
    """Return tensors as text for SGLang's ``/update_weights_from_tensor``, whose only format is a pickle."""
    return base64.b64encode(pickle.dumps(list(tensors.items()), protocol=4)).decode("ascii")


def serialize_shared(tensors: Mapping[str, Tensor]) -> str:
    """Return ``serialize`` without the values: they move to shared memory, for one process of this machine.

    The memory is freed when both processes have released it. Memory that is never taken stays until this process ends.

    Raises:
        RuntimeError: shared memory is full or not available.
    """
    buffer = io.BytesIO()
    strategy: Any = multiprocessing  # it has no types
    before = strategy.get_sharing_strategy()
    strategy.set_sharing_strategy("file_system")  # by name: a descriptor would have to be passed on
    try:
        ForkingPickler(buffer, 4).dump(list(tensors.items()))
    finally:
        strategy.set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def checksum_cpu(tensor: Tensor) -> str:
    """Return the checksum of a tensor on a CPU."""
    return hashlib.sha256(_bytes(tensor).data).hexdigest()[:16]


def checksum_gpu(tensor: Tensor) -> str:
    """Return the checksum of a tensor on a GPU; the server's own kernel for it is ``gpu_tensor_hash``."""
    data = _bytes(tensor)
    data = np.concatenate([data, np.zeros(-len(data) % 4, np.uint8)])
    words = data.view(np.uint32)
    total = sum(int(_tile_sums(words, at).sum(dtype=np.uint64)) for at in range(0, len(words), _BLOCK))
    return f"{_mix_total(total):016x}" if len(words) else f"{0:016x}"


SCHEMES: tuple[ChecksumScheme, ...] = tuple(
    product((checksum_cpu, checksum_gpu), (torch.bfloat16, torch.float32, torch.float16))
)


@dataclass(frozen=True, slots=True)
class RankChecksums:
    """What a tensor-parallel rank of the server holds."""

    checksums: Checksums
    """By the server's names."""
    shard: Shard


class ExpectedChecksums:
    """The checksums of a server that holds a draft; each scheme is computed on first use, for each rank.

    Args:
        tensors: From ``draft_tensors``.
        key_heads: Heads of keys and values.
    """

    def __init__(self, tensors: Mapping[str, Tensor], key_heads: int) -> None:
        self._tensors, self._key_heads = tensors, key_heads
        self._cache: dict[tuple[ChecksumScheme, Shard], Checksums] = {}

    def compute(self, scheme: ChecksumScheme, shard: Shard) -> Checksums:
        """Return the checksums of one scheme and rank, by the server's names without ``DRAFT``.

        Raises:
            ValueError: no server divides the draft into so many ranks.
        """
        if (scheme, shard) not in self._cache:
            checksum, dtype = scheme
            tensors = fuse_tensors(shard_tensors(self._tensors, self._key_heads, shard))
            self._cache[scheme, shard] = {name: checksum(value.to(dtype)) for name, value in tensors.items()}
        return self._cache[scheme, shard]


@dataclass(frozen=True, slots=True)
class ChecksumDifference:
    """Difference between a server's draft and an expected one."""

    names: tuple[str, ...]
    """Tensors that differ, by the nearest scheme."""
    scheme: ChecksumScheme | None
    """The server's scheme; None if it holds another draft."""


def compare_checksums(
    ranks: Sequence[RankChecksums], expected: ExpectedChecksums, schemes: Sequence[ChecksumScheme] = SCHEMES
) -> ChecksumDifference:
    """Compare a server's checksums with those of a draft: each rank's with those of its part.

    Args:
        ranks: Of the server.
        expected: Checksums of the draft.
        schemes: Schemes to try, in this order.

    Raises:
        ValueError: no server divides the draft into so many ranks.
    """
    nearest: tuple[str, ...] | None = None
    for scheme in schemes:
        differing = dict.fromkeys(
            name
            for rank in ranks
            for name, checksum in expected.compute(scheme, rank.shard).items()
            if rank.checksums.get(DRAFT + name) != checksum
        )
        if not differing and ranks:
            return ChecksumDifference((), scheme)
        if nearest is None or len(differing) < len(nearest):
            nearest = tuple(differing)
    return ChecksumDifference(nearest or ("all",), None)


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    flat: npt.NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _tile_sums(words: Words, at: int) -> npt.NDArray[np.uint64]:
    """Return the sums of the tiles of the block that begins at word ``at``."""
    block = words[at : at + _BLOCK]
    positions = np.arange(at, at + len(block), dtype=np.uint64).astype(np.uint32)
    padding = -len(block) % _TILE
    halves = []
    for seed, (factor, turn) in zip(_SEEDS, _POSITIONS, strict=True):
        turned = (positions << np.uint32(turn)) | (positions >> np.uint32(32 - turn))
        mixed = _mix(block ^ ((positions * np.uint32(factor) + np.uint32(seed)) ^ turned))
        tiles = np.pad(mixed, (0, padding)).reshape(-1, _TILE).sum(axis=1, dtype=np.uint32)
        halves.append(_mix(tiles ^ np.uint32(len(words) * 4 & 0xFFFFFFFF)).astype(np.uint64))
    return (halves[0] << np.uint64(32)) | halves[1]


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    mixed: Words = words ^ (words >> np.uint32(16))
    return mixed


def _mix_total(total: int) -> int:
    mask = (1 << 64) - 1
    total &= mask
    total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 & mask
    total = (total ^ total >> 27) * 0x94D049BB133111EB & mask
    return total ^ total >> 31
