"""Conversion between float32 and the bf16 bit patterns of trace records."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from schemas.trace.record import F32, U16


def to_bf16(x: npt.NDArray[np.float32]) -> U16:
    """Return the bit patterns of ``x`` in bfloat16, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: U16) -> F32:
    """Return the float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
