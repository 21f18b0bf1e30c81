"""Matrix kernels for few rows.

Decoding multiplies a handful of rows with every weight, where memory bandwidth and the kernel decide. torch's packed
fp16 weights (fbgemm) halve the bytes and are made for few rows: products and sums stay in fp32. Where every weight of a
target is exactly an fp16 number, that is fp32 arithmetic on the target's own weights, and only the order of additions
differs from a dense fp32 product.
"""

from __future__ import annotations

from typing import Any

import structlog
import torch
from torch import Tensor, nn

log = structlog.get_logger()


class PackedLinear(nn.Module):
    """A bias-free or biased linear layer on packed fp16 weights, fp32 in and out."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(dense.weight.detach(), dense.bias)
        self.in_features, self.out_features = dense.in_features, dense.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] → [.., out]."""
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out


def pack_linears(model: nn.Module) -> int:
    """Replace every linear layer whose weights are fp16 numbers by a packed one.

    Returns:
        How many were replaced; a layer that would lose bits stays dense.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        log.info("packed_kernels_unavailable", engines=torch.backends.quantized.supported_engines)
        return 0
    packed = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and _is_fp16(child.weight):
                setattr(module, name, PackedLinear(child))
                packed += 1
    return packed


def _is_fp16(weight: Tensor) -> bool:
    return bool((weight.half().float() == weight).all())
