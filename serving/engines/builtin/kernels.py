"""Matrix kernels for forwards over few rows.

Decoding multiplies a few rows with every weight, so memory bandwidth and the kernel determine its speed. The fastest
kernel differs between processors, so ``choose_weight_dtype`` times them at start on the target's own layers.

========  ======  ==========================================================================================
dtype     bytes   arithmetic
========  ======  ==========================================================================================
float32   4       oneDNN on weights packed once, cuBLAS on a GPU; fp32 throughout
float16   2       fbgemm; fp16 weights, fp32 products and sums. Exact if every weight is an fp16 number.
                  On a GPU inputs are rounded to fp16 as well, which changes the target
int8      1       weights rounded to 8 bits per output channel, inputs to 8 bits per row; exact integer sums
========  ======  ==========================================================================================

``float32``, and on a CPU ``float16``, compute the unchanged target; only the order of additions differs. A dtype that
changes the target is used only if the setting names it. The sums of ``int8`` are integers and every row has its own
scale, so a row's product does not depend on the rest of the batch.

Shape suffixes: O outputs, I inputs, R rows, V vocabulary, k likeliest entries, C chunks of a row, W width.
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

WeightDtype = Literal["float32", "float16", "int8"]

_CHUNKS = 256
"""``topk`` divides the vocabulary into this many chunks."""
_TIMED_ROWS = (1, 4, 8)
_TIMED_BYTES = 128 << 20
"""Size of the timed weights: more than a core's caches hold, so that weights are read from memory as in decoding."""
_TRIALS = 5
_TINY = torch.finfo(torch.float32).tiny


class KernelError(ValueError):
    """This machine or this target does not support the kernel."""


class PackedFp32(nn.Module):
    """A linear layer with oneDNN's packed fp32 weights."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), None)
        self._bias_O = bias_O

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] → [.., O]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias_O, "none", [], "")
        return out


class PackedFp16(nn.Module):
    """A linear layer with fbgemm's packed fp16 weights, fp32 inputs and outputs."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight_OI.detach(), bias_O)

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] → [.., O]."""
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out


class PackedInt8(nn.Module):
    """A linear layer with 8-bit weights, one scale per output channel, and 8-bit inputs, one scale per row."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        scale_O = (weight_OI.detach().abs().amax(1) / 127).clamp_min(_TINY)
        zeros_O = torch.zeros(len(scale_O), dtype=torch.int64)
        with warnings.catch_warnings():
            # Deprecated, but the only source of fbgemm's packed int8 weights; torch is pinned.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
            weight = torch.quantize_per_channel(weight_OI.detach(), scale_O.double(), zeros_O, 0, torch.qint8)
        self._packed: Any = torch.ops.quantized.linear_prepack(weight, None)
        self._bias_O = bias_O
        # Without VNNI, fbgemm adds two 8-bit products in 16 bits, which overflow unless the inputs have 7 bits.
        self._levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] → [.., O]."""
        scale = x.abs().amax(-1, keepdim=True).clamp_min_(_TINY)
        out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1 / self._levels, self._levels + 1, self._packed
        )
        out.mul_(scale)
        return out if self._bias_O is None else out.add_(self._bias_O)


class Dense(nn.Module):
    """A linear layer with torch's own kernel, for GPUs and for CPUs without packed kernels."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # Buffers, so that a swap can overwrite the weights at the addresses that a CUDA graph reads.
        self.register_buffer("weight_OI", weight_OI.detach().to(dtype))
        self.register_buffer("bias_O", None if bias_O is None else bias_O.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] → [.., O]."""
        return F.linear(x.to(self.weight_OI.dtype), self.weight_OI, self.bias_O).to(x.dtype)


class UnitNorm(nn.Module):
    """RMS norm without a gain and without a factor of sqrt(W), both of which a matrix behind it can contain.

    It is x / hypot(|x|, sqrt(W eps)): three small CPU kernels where torch's own norm runs nine.
    """

    _floor: Tensor
    _even_W: Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self._eps = eps
        # Buffers, so that they follow the module to its device.
        self.register_buffer("_floor", torch.tensor(math.sqrt(width * eps)))
        self.register_buffer("_even_W", torch.full((width,), width**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[.., W] → [.., W]."""
        if x.is_cuda:
            return F.rms_norm(x, self._even_W.shape, self._even_W, self._eps)
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor)


class RmsNorm(nn.Module):
    """RMS norm with a gain, on a CPU by ``UnitNorm``."""

    weight_W: Tensor
    _scaled_W: Tensor

    def __init__(self, weight_W: Tensor, eps: float) -> None:
        super().__init__()
        self._eps = eps
        self._unit = UnitNorm(len(weight_W), eps).to(weight_W.device)
        # Buffers, so that a swap can overwrite the weights at the addresses that a CUDA graph reads.
        self.register_buffer("weight_W", weight_W.detach())
        self.register_buffer("_scaled_W", weight_W.detach() * math.sqrt(len(weight_W)))

    def forward(self, x: Tensor) -> Tensor:
        """[.., W] → [.., W]."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight_W.shape, self.weight_W, self._eps)
        unit: Tensor = self._unit(x)
        return unit.mul_(self._scaled_W)


def pack_linear(dtype: WeightDtype, weight_OI: Tensor, bias_O: Tensor | None = None) -> nn.Module:
    """Return a linear layer with packed weights.

    Raises:
        KernelError: the dtype needs fbgemm, which this build of torch lacks, or does not run on GPUs.
    """
    if weight_OI.is_cuda:
        if dtype == "int8":
            raise KernelError("serve.weight_dtype = 'int8' does not run on GPUs; use 'float32' or 'float16'")
        return Dense(weight_OI, bias_O, torch.float16 if dtype == "float16" else torch.float32)
    if dtype == "float32":
        has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return (PackedFp32 if has_onednn else Dense)(weight_OI, bias_O)
    if not has_fbgemm():
        raise KernelError(f"serve.weight_dtype = {dtype!r}: this build of torch has no fbgemm kernels; use 'float32'")
    return (PackedFp16 if dtype == "float16" else PackedInt8)(weight_OI, bias_O)


def choose_weight_dtype(setting: WeightDtype | Literal["auto"], weights: Sequence[Tensor]) -> WeightDtype:
    """Return the dtype that the setting names; for ``auto``, the fastest one that computes the unchanged target.

    Args:
        setting: ``serve.weight_dtype``.
        weights: The target's matrices [O, I], fp32.
    """
    exact, on_gpu = all(fits_fp16(weight) for weight in weights), weights[0].is_cuda
    if setting != "auto":
        if setting == "float16" and (on_gpu or not exact):
            why = "a GPU multiplies fp16 inputs" if on_gpu else "some weights are no fp16 numbers"
            log.warning("target_weights_rounded", setting="serve.weight_dtype", dtype=setting, why=why)
        return setting
    if on_gpu or not (exact and has_fbgemm()):
        return "float32"
    sample = _sample(weights)
    times: dict[WeightDtype, list[float]] = {dtype: _time_ms(dtype, sample) for dtype in ("float32", "float16")}
    chosen = min(times, key=lambda dtype: sum(times[dtype]))
    sampled_mb = sum(weight.nbytes for weight in sample) >> 20
    log.info("weight_dtype_chosen", chosen=chosen, rows=_TIMED_ROWS, sampled_mb=sampled_mb, **times)
    return chosen


def replace_linears(model: nn.Module, dtype: WeightDtype) -> None:
    """Replace every linear layer of a model by a packed one."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, pack_linear(dtype, child.weight, child.bias))


def replace_norms(model: nn.Module) -> None:
    """Replace every RMS norm of a model by ``RmsNorm``."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.RMSNorm):
                eps = torch.finfo(child.weight.dtype).eps if child.eps is None else child.eps
                setattr(module, name, RmsNorm(child.weight, eps))


def fits_fp16(weight: Tensor) -> bool:
    """Return whether fp16 represents every number of a matrix exactly."""
    return bool((weight.half().float() == weight).all())


class TopK(NamedTuple):
    """The k largest entries of every row, largest first."""

    ids_Rk: Tensor
    scores_Rk: Tensor


def topk(scores_RV: Tensor, k: int) -> TopK:
    """Return the ``k`` largest entries of every row.

    They lie in the k chunks of the row with the largest maxima. So all but k chunks are read only for their maximum,
    which takes a fifth of the time of ``torch.topk`` over the whole row, and less than ``argmax``.
    """
    if k == 1 and scores_RV.is_cpu:
        # NumPy compares with vector instructions: a sixth of the time of torch's.
        ids_R1 = torch.from_numpy(scores_RV.numpy().argmax(-1)).unsqueeze(-1)
        return TopK(ids_R1, scores_RV.gather(1, ids_R1))
    rows, width = scores_RV.shape[0], scores_RV.shape[1] // _CHUNKS
    if k >= _CHUNKS or width < 2 or scores_RV.shape[1] % _CHUNKS:
        top = scores_RV.topk(k, dim=-1)
        return TopK(top.indices, top.values)
    chunks_RCW = scores_RV.view(rows, _CHUNKS, width)
    best_Rk = chunks_RCW.amax(dim=-1).topk(k, dim=-1).indices
    within = chunks_RCW.gather(1, best_Rk[..., None].expand(-1, -1, width)).flatten(1).topk(k, dim=-1)
    ids_Rk = best_Rk.gather(1, within.indices // width) * width + within.indices % width
    return TopK(ids_Rk, within.values)


def _median_seconds(call: Callable[[], object], trials: int = _TRIALS) -> float:
    """Return the median duration of a call, after one call to warm up."""
    call()
    times = []
    for _ in range(trials):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _time_ms(dtype: WeightDtype, weights: Sequence[Tensor]) -> list[float]:
    """Return the median milliseconds through all matrices, for each number of rows."""
    packed = [(pack_linear(dtype, weight), weight.shape[1]) for weight in weights]
    times = []
    for rows in _TIMED_ROWS:
        inputs = {width: torch.randn(rows, width) for _, width in packed}
        times.append(round(_median_seconds(partial(_run_through, packed, inputs)) * 1e3, 2))
    return times


def _run_through(packed: Sequence[tuple[nn.Module, int]], inputs: Mapping[int, Tensor]) -> None:
    for layer, width in packed:
        layer(inputs[width])


def _sample(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the first matrices, up to the size that a timing needs."""
    chosen: list[Tensor] = []
    size = 0
    for weight in weights:
        if chosen and size + weight.nbytes > _TIMED_BYTES:
            break
        chosen.append(weight)
        size += weight.nbytes
    return chosen


def has_fbgemm() -> bool:
    """Return whether this build of torch has the kernels of ``float16`` and ``int8``."""
    return "fbgemm" in torch.backends.quantized.supported_engines
