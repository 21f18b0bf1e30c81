"""Matrix kernels for few rows.

Decoding multiplies a handful of rows with every weight, where memory bandwidth and the kernel decide. Which kernel is
fastest differs from processor to processor, so ``choose`` times them at start on the target's own layers.

========  ======  ==========================================================================================
kind      bytes   arithmetic
========  ======  ==========================================================================================
float32   4       oneDNN on weights packed once, cuBLAS on a GPU; fp32 throughout
float16   2       fbgemm; fp16 weights, fp32 products and sums. Exact where every weight is an fp16 number.
                  On a GPU inputs are rounded to fp16 as well: another target than the one that was trained
int8      1       weights rounded to 8 bits an output channel, inputs to 8 bits a row; exact integer sums
========  ======  ==========================================================================================

``float32``, and on a processor ``float16``, compute the target as it is; only the order of additions differs. What is
another target than the one that was trained is used only where it is asked for. The sums of ``int8`` are integers and
every row has a scale of its own, so a row's product is the same whatever else is in the batch.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import structlog
import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = structlog.get_logger()

Kind = Literal["float32", "float16", "int8"]

_PIECES = 256
"""``likeliest`` looks at the vocabulary in this many pieces."""
_TIMED_ROWS = (1, 4, 8)
_TIMED_BYTES = 128 << 20
"""Weights that a timing runs through: more than a core's own caches hold, so that memory is read as in decoding."""
_TRIALS = 5


class KernelError(ValueError):
    """A kernel that this machine or this target cannot use."""


class PackedFp32(nn.Module):
    """A linear layer on oneDNN's packed fp32 weights."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), None)
        self._bias_O = bias_O

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] → [.., O]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias_O, "none", [], "")
        return out


class PackedFp16(nn.Module):
    """A linear layer on fbgemm's packed fp16 weights, fp32 in and out."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight_OI.detach(), bias_O)

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] → [.., O]."""
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out


class PackedInt8(nn.Module):
    """A linear layer on 8-bit weights, one scale an output channel, and 8-bit inputs, one scale a row."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        scale_O = (weight_OI.detach().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        zeros_O = torch.zeros(len(scale_O), dtype=torch.int64)
        with warnings.catch_warnings():
            # Announced to go some day; fbgemm's packed int8 weights are made of nothing else, and torch is pinned.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
            weight = torch.quantize_per_channel(weight_OI.detach(), scale_O.double(), zeros_O, 0, torch.qint8)
        self._packed: Any = torch.ops.quantized.linear_prepack(weight, None)
        self._bias_O = bias_O
        # Without VNNI, fbgemm adds two 8-bit products in 16 bits, which overflow unless the inputs keep to 7 bits.
        self._levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] → [.., O]."""
        scale = x.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1 / self._levels, self._levels + 1, self._packed
        )
        out.mul_(scale)
        return out if self._bias_O is None else out.add_(self._bias_O)


class Dense(nn.Module):
    """A linear layer as torch has it, for GPUs and for processors without packed kernels."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # Buffers, so that other weights can be put in their place where a captured graph reads them.
        self.register_buffer("weight_OI", weight_OI.detach().to(dtype))
        self.register_buffer("bias_O", None if bias_O is None else bias_O.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] → [.., O]."""
        return F.linear(x.to(self.weight_OI.dtype), self.weight_OI, self.bias_O).to(x.dtype)


class RmsNorm(nn.Module):
    """Division by the root of the mean square, times a gain.

    torch composes its own of nine small kernels on a processor, which here are four: x / hypot(|x|, sqrt(W eps)) is the
    same but for a factor of sqrt(W), which lies in the gain.
    """

    weight_W: Tensor
    _scaled_W: Tensor
    _floor: Tensor

    def __init__(self, weight_W: Tensor, eps: float) -> None:
        super().__init__()
        width = len(weight_W)
        self._eps = eps
        # Buffers, so that other weights can be put in their place where a captured graph reads them.
        self.register_buffer("weight_W", weight_W.detach())
        self.register_buffer("_scaled_W", weight_W.detach() * math.sqrt(width))
        self.register_buffer("_floor", torch.tensor(math.sqrt(width * eps), device=weight_W.device))

    def forward(self, x: Tensor) -> Tensor:
        """[.., W] → [.., W]."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight_W.shape, self.weight_W, self._eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / torch.hypot(length, self._floor)).mul_(self._scaled_W)


def pack(kind: Kind, weight_OI: Tensor, bias_O: Tensor | None = None) -> nn.Module:
    """A linear layer on packed weights.

    Raises:
        KernelError: the kind needs fbgemm, which this build of torch has not, or is not for GPUs.
    """
    if weight_OI.is_cuda:
        if kind == "int8":
            raise KernelError("serve.weight_dtype = 'int8': not for GPUs; use 'float32' or 'float16'")
        return Dense(weight_OI, bias_O, torch.float16 if kind == "float16" else torch.float32)
    if kind == "float32":
        has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return (PackedFp32 if has_onednn else Dense)(weight_OI, bias_O)
    if not _has_fbgemm():
        raise KernelError(f"serve.weight_dtype = {kind!r}: this build of torch has no fbgemm kernels; use 'float32'")
    return (PackedFp16 if kind == "float16" else PackedInt8)(weight_OI, bias_O)


def choose(asked: Kind | Literal["auto"], weights: Sequence[Tensor]) -> Kind:
    """The kernel to use: the one asked for, or the fastest of those that compute the target exactly as it is.

    Args:
        asked: The setting ``serve.weight_dtype``.
        weights: The target's matrices [O, I], fp32.

    Raises:
        KernelError: a kernel is asked for that does not run here.
    """
    exact, on_gpu = all(is_fp16(weight) for weight in weights), weights[0].is_cuda
    if asked != "auto":
        if asked == "float16" and (on_gpu or not exact):
            why = "a GPU multiplies fp16 inputs" if on_gpu else "some weights are no fp16 numbers"
            log.warning("target_rounded", setting="serve.weight_dtype", kind=asked, why=why)
        return asked
    if on_gpu or not (exact and _has_fbgemm()):
        return "float32"
    sample = _sample(weights)
    times: dict[Kind, list[float]] = {kind: _times_ms(kind, sample) for kind in ("float32", "float16")}
    chosen = min(times, key=lambda kind: sum(times[kind]))
    log.info("kernel_calibrated", chosen=chosen, rows=_TIMED_ROWS, sampled_mb=_megabytes(sample), **times)
    return chosen


def narrow(device: torch.device) -> Kind:
    """The kernel for weights that may be rounded to 16 bits."""
    return "float16" if device.type == "cuda" or _has_fbgemm() else "float32"


def replace_linears(model: nn.Module, kind: Kind) -> None:
    """Put packed layers in the place of every linear layer of a model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, pack(kind, child.weight, child.bias))


def replace_norms(model: nn.Module) -> None:
    """Put the norm with fewer kernels in the place of every RMS norm of a model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.RMSNorm):
                eps = torch.finfo(child.weight.dtype).eps if child.eps is None else child.eps
                setattr(module, name, RmsNorm(child.weight, eps))


def is_fp16(weight: Tensor) -> bool:
    """Whether every number of a matrix survives fp16."""
    return bool((weight.half().float() == weight).all())


class Likeliest(NamedTuple):
    """The best entries of every row, best first."""

    ids_Rk: Tensor
    scores_Rk: Tensor


def likeliest(scores_RV: Tensor, k: int) -> Likeliest:
    """The ``k`` best entries of every row.

    The k best lie in the k pieces of a row whose maxima are best, so that all but a few pieces are read for their
    maximum only, which takes a fifth of the time of ``topk`` over the whole row, and less than ``argmax``.
    """
    rows, width = scores_RV.shape[0], scores_RV.shape[1] // _PIECES
    if k >= _PIECES or width < 2 or scores_RV.shape[1] % _PIECES:
        top = scores_RV.topk(k, dim=-1)
        return Likeliest(top.indices, top.values)
    pieces_RCW = scores_RV.view(rows, _PIECES, width)
    best_Rk = pieces_RCW.amax(dim=-1).topk(k, dim=-1).indices
    within = pieces_RCW.gather(1, best_Rk[..., None].expand(-1, -1, width)).flatten(1).topk(k, dim=-1)
    ids_Rk = best_Rk.gather(1, within.indices // width) * width + within.indices % width
    return Likeliest(ids_Rk, within.values)


def median_s(call: Callable[[], object], trials: int = _TRIALS) -> float:
    """Median seconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(trials):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _times_ms(kind: Kind, weights: Sequence[Tensor]) -> list[float]:
    """Median milliseconds through all of the matrices, for each number of rows."""
    packed = [(pack(kind, weight), weight.shape[1]) for weight in weights]
    times = []
    for rows in _TIMED_ROWS:
        inputs = {width: torch.randn(rows, width) for _, width in packed}
        times.append(round(median_s(partial(_run_through, packed, inputs)) * 1e3, 2))
    return times


def _run_through(packed: Sequence[tuple[nn.Module, int]], inputs: Mapping[int, Tensor]) -> None:
    for layer, width in packed:
        layer(inputs[width])


def _sample(weights: Sequence[Tensor]) -> list[Tensor]:
    """The first matrices, up to what a timing needs."""
    chosen: list[Tensor] = []
    size = 0
    for weight in weights:
        if chosen and size + weight.nbytes > _TIMED_BYTES:
            break
        chosen.append(weight)
        size += weight.nbytes
    return chosen


def _megabytes(weights: Sequence[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights) >> 20


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines
