"""The sums that SGLang's ``/weights_checker`` names for its weights, computed from a draft of ours.

They are over the bytes of each tensor in the type in which the server holds it, and differ between devices: the start
of a SHA-256 on a CPU, and on a GPU a sum over tiles of mixed words that many threads can form at once. Neither type nor
device have to be known: a server holds a draft if its sums are those of the draft in one of the types, by one of the
two ways.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.sglang.weights import held, is_whole

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


def expected(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """What a server of one rank may say when it holds these: for every type, and for each kind of device.

    Args:
        tensors: From ``weights.sent``.
    """
    whole = held(tensors)
    for form, dtype in product((on_cpu, on_gpu), TYPES):
        yield {name: form(value.to(dtype)) for name, value in whole.items()}


def differences(ranks: Sequence[Sums], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of a server that are not those of the draft; none where it holds the draft.

    With several ranks only those are compared that every rank holds whole: the others are cut.

    Args:
        ranks: What each rank says, by the server's names.
        tensors: From ``weights.sent``.
    """
    best: list[str] | None = None
    for wanted in expected(tensors):
        compared = [name for name in wanted if len(ranks) == 1 or is_whole(name)]
        found = [name for name in compared if any(rank.get(DRAFT + name) != wanted[name] for rank in ranks)]
        if not found:
            return []
        if best is None or len(found) < len(best):
            best = found
    return best or []


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
