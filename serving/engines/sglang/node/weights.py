"""A draft of ours as SGLang's server takes it, and as it holds it."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, multiprocessing

from schemas.speculator.network import EagleDraft

_OF_THE_LINE = ("d2t", "t2d")
"""A server reads them once, at its start, and they are the same for every version of a line."""
_LAYER = "layers.0"
WHOLE_ON_EVERY_RANK = ("fc", "norm")
"""What tensor parallelism does not cut: last parts of the names of such modules."""


def sent(draft: EagleDraft) -> dict[str, Tensor]:
    """What an update consists of: weights by their names in a version's file, in the type of that file."""
    return {
        name: value.detach().to(torch.bfloat16).cpu().contiguous()
        for name, value in draft.state_dict().items()
        if name not in _OF_THE_LINE
    }


def packed(tensors: Mapping[str, Tensor]) -> str:
    """``sent`` as text for SGLang's ``/update_weights_from_tensor``, which knows no other form than a pickle."""
    return base64.b64encode(pickle.dumps(list(tensors.items()), protocol=4)).decode("ascii")


def shared(tensors: Mapping[str, Tensor]) -> str:
    """``packed`` without the values: these move into shared memory, from where one process of this machine takes them.

    They are freed when both have let go of them. What is never taken stays until this process ends.

    Raises:
        RuntimeError: there is no room, or no shared memory.
    """
    buffer = io.BytesIO()
    strategy: Any = multiprocessing  # it has no types
    before = strategy.get_sharing_strategy()
    strategy.set_sharing_strategy("file_system")  # by name: a descriptor would have to be handed over
    try:
        ForkingPickler(buffer, 4).dump(list(tensors.items()))
    finally:
        strategy.set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a server of one rank makes of ``sent``: by its own names, in the type sent, and some joined into one."""
    found = {name.replace("midlayer", _LAYER): value for name, value in tensors.items()}
    for joined, parts in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        found[f"{_LAYER}.{joined}.weight"] = torch.cat([found.pop(f"{_LAYER}.{part}.weight") for part in parts])
    return {name if name.startswith("lm_head") else f"model.{name}": value for name, value in found.items()}


def is_whole(name: str) -> bool:
    """Whether every rank of a tensor-parallel group holds all of a tensor that ``held`` names."""
    module = name.removesuffix(".weight").rstrip("0123456789.").rsplit(".", 1)[-1]
    return module.endswith(WHOLE_ON_EVERY_RANK)
