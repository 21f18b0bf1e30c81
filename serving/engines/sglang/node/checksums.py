"""The sums that SGLang's ``/weights_checker`` names for its weights, computed from a draft of ours.

They are over the bytes of each tensor in the type in which the server holds it, and differ between devices: the start
of a SHA-256 on a CPU, and on a GPU a sum over tiles of mixed words that many threads can form at once. Neither type nor
device have to be known: a server holds a draft if its sums are those of the draft in one of the types, by one of the
two ways.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.engines.sglang.node.weights import held, is_whole

Words = npt.NDArray[np.uint32]
Sums = Mapping[str, str]

TYPES = (torch.bfloat16, torch.float32, torch.float16)
DRAFT = "draft."
"""Before the names of a draft's tensors."""

_TILE = 8192
"""Words that are summed up together on a GPU."""
_BLOCK = 256 * _TILE
"""Words that are mixed at once here, to bound memory."""
_SEEDS = (0x243F6A88, (0x243F6A88 * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF)
_PLACES = ((0x27D4EB2D, 15), (0x165667B1, 13))


def on_cpu(tensor: Tensor) -> str:
    """The sum of a tensor on a CPU."""
    return hashlib.sha256(_bytes(tensor).data).hexdigest()[:16]


def on_gpu(tensor: Tensor) -> str:
    """The sum of a tensor on a GPU; the server's own kernel for it is ``gpu_tensor_hash``."""
    data = _bytes(tensor)
    data = np.concatenate([data, np.zeros(-len(data) % 4, np.uint8)])
    words = data.view(np.uint32)
    total = sum(int(_tiles(words, at).sum(dtype=np.uint64)) for at in range(0, len(words), _BLOCK))
    return f"{_finished(total):016x}" if len(words) else f"{0:016x}"


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    flat: npt.NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _tiles(words: Words, at: int) -> npt.NDArray[np.uint64]:
    """Sums of the tiles of a block that begins at word ``at``."""
    block = words[at : at + _BLOCK]
    places = np.arange(at, at + len(block), dtype=np.uint64).astype(np.uint32)
    padding = -len(block) % _TILE
    halves = []
    for seed, (factor, turn) in zip(_SEEDS, _PLACES, strict=True):
        turned = (places << np.uint32(turn)) | (places >> np.uint32(32 - turn))
        mixed = _mixed(block ^ ((places * np.uint32(factor) + np.uint32(seed)) ^ turned))
        tiles = np.pad(mixed, (0, padding)).reshape(-1, _TILE).sum(axis=1, dtype=np.uint32)
        halves.append(_mixed(tiles ^ np.uint32(len(words) * 4 & 0xFFFFFFFF)).astype(np.uint64))
    return (halves[0] << np.uint64(32)) | halves[1]


def _mixed(words: Words) -> Words:
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    mixed: Words = words ^ (words >> np.uint32(16))
    return mixed


def _finished(total: int) -> int:
    mask = (1 << 64) - 1
    total &= mask
    total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 & mask
    total = (total ^ total >> 27) * 0x94D049BB133111EB & mask
    return total ^ total >> 31


Way = tuple[Callable[[Tensor], str], torch.dtype]
WAYS: tuple[Way, ...] = tuple(product((on_cpu, on_gpu), TYPES))
"""Kinds of device, and types in which a server may hold a draft."""


class Expected:
    """What a server of one rank may say when it holds a draft: each way formed when it is first asked for.

    Args:
        tensors: From ``weights.sent``.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._formed: dict[Way, Sums] = {}

    def by(self, way: Way) -> Sums:
        """The sums one way, by the server's names without ``DRAFT``."""
        if way not in self._formed:
            form, dtype = way
            self._formed[way] = {name: form(value.to(dtype)) for name, value in held(self._tensors).items()}
        return self._formed[way]


@dataclass(frozen=True, slots=True)
class Difference:
    """Names of the tensors that a server holds otherwise than a draft has them, the nearest way."""

    names: tuple[str, ...]
    way: Way | None
    """How its sums are formed; None where it holds another draft."""


def compare(ranks: Sequence[Sums], expected: Expected, ways: Sequence[Way] = WAYS) -> Difference:
    """Whether a server holds a draft.

    With several ranks only those tensors are compared that every rank holds whole: the others are cut.

    Args:
        ranks: What each rank says, by the server's names.
        expected: Of the draft.
        ways: To be tried, in this order.
    """
    nearest: tuple[str, ...] | None = None
    for way in ways:
        wanted = expected.by(way)
        compared = [name for name in wanted if len(ranks) == 1 or is_whole(name)]
        found = tuple(name for name in compared if any(rank.get(DRAFT + name) != wanted[name] for rank in ranks))
        if not found and ranks:
            return Difference((), way)
        if nearest is None or len(found) < len(nearest):
            nearest = found
    return Difference(nearest or ("all",), None)
