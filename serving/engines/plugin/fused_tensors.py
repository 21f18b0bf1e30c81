"""A draft's tensors as servers hold them: SGLang and vLLM name them alike, and fuse the same ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LAYER = "layers.0"
_FUSED = (
    ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
)


def fuse_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a version's file, without its vocabulary tables, as a server of one rank holds them."""
    found = {name.replace("midlayer", _LAYER): value for name, value in tensors.items()}
    for fused, parts in _FUSED:
        found[f"{_LAYER}.{fused}.weight"] = torch.cat([found.pop(f"{_LAYER}.{part}.weight") for part in parts])
    return {name if name.startswith("lm_head") else f"model.{name}": value for name, value in found.items()}
