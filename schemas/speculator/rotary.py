"""Rotary position embedding of the draft: unscaled, or scaled as in Llama-like targets.

The draft uses its target's scaling, so that it supports the same context length. Names are those of the target's
``config.json``.

Shape suffixes: B sequences, T rows, N heads, E head size, e = E / 2 frequencies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import structlog
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from torch import Tensor

log = structlog.get_logger()

_Number = Annotated[float, Field(gt=0, lt=2**31, allow_inf_nan=False)]
_Positions = Annotated[int, Field(gt=0, lt=2**31)]
_STRICT = with_config(ConfigDict(extra="forbid", strict=True))


@_STRICT
@dataclass(frozen=True, slots=True)
class Linear:
    """Every frequency divided by ``factor``: position interpolation (arXiv 2306.15595)."""

    factor: _Number

    def frequencies(self, unscaled_e: Tensor, _theta: float) -> Tensor:
        """Return the scaled frequencies."""
        return unscaled_e / self.factor

    @property
    def magnitude(self) -> float:
        """Factor on cosine and sine."""
        return 1.0


@_STRICT
@dataclass(frozen=True, slots=True)
class Llama3:
    """Low frequencies divided by ``factor``, high ones kept, with a smooth transition between them: Llama 3.1."""

    factor: _Number
    low_freq_factor: _Number
    high_freq_factor: _Number
    original_max_position_embeddings: _Positions

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")

    def frequencies(self, unscaled_e: Tensor, _theta: float) -> Tensor:
        """Return the scaled frequencies."""
        turns_e = self.original_max_position_embeddings * unscaled_e / (2 * math.pi)
        kept_e = ((turns_e - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return unscaled_e * (kept_e + (1 - kept_e) / self.factor)

    @property
    def magnitude(self) -> float:
        """Factor on cosine and sine."""
        return 1.0


@_STRICT
@dataclass(frozen=True, slots=True)
class Yarn:
    """A linear transition over the dimensions from kept to divided frequencies, and larger scores: arXiv 2309.00071."""

    factor: _Number
    original_max_position_embeddings: _Positions
    beta_fast: _Number = 32.0
    beta_slow: _Number = 1.0

    def frequencies(self, unscaled_e: Tensor, theta: float) -> Tensor:
        """Return the scaled frequencies."""
        size = 2 * len(unscaled_e)
        low = max(math.floor(self._dimension(self.beta_fast, size, theta)), 0)
        high = min(math.ceil(self._dimension(self.beta_slow, size, theta)), size - 1)
        place_e = torch.arange(len(unscaled_e), dtype=torch.float32, device=unscaled_e.device)
        divided_e = ((place_e - low) / max(high - low, 0.001)).clamp(0, 1)
        return unscaled_e * (1 - divided_e + divided_e / self.factor)

    @property
    def magnitude(self) -> float:
        """Factor on cosine and sine."""
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def _dimension(self, turns: float, size: int, theta: float) -> float:
        """Return the dimension with this number of turns over the positions of the target's original training."""
        return size * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))


Scaling = Linear | Llama3 | Yarn
_KINDS: dict[str, type[Scaling]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}
_UNUSED = "attn_factor"
"""A factor on YaRN's magnitude that some servers read, and transformers does not."""


def parse_scaling(config: Mapping[str, Any]) -> Scaling | None:
    """Return the scaling in a ``config.json``; None if frequencies are unscaled.

    Raises:
        ValueError: the scaling is not supported, or a value is missing, unknown or invalid.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope} or {"default"}
    rope.pop("rope_theta", None)
    if rope.pop(_UNUSED, None) is not None:
        # Neither does the target: transformers' rotary embedding does not know it.
        log.warning("rope_parameter_ignored", parameter=_UNUSED)
    if kinds == {"default"}:
        return None
    kind = kinds.pop()
    if kinds or kind not in _KINDS:
        known = ", ".join(["'default'", *map(repr, _KINDS)])
        raise ValueError(f"rope_type {kind!r} is not supported by the draft network; supported: {known}")
    if kind != "linear" and "original_max_position_embeddings" not in rope:
        first = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
        rope["original_max_position_embeddings"] = first
    try:
        given = json.dumps({key: value for key, value in rope.items() if value is not None})
        scaling: Scaling = TypeAdapter(_KINDS[kind]).validate_json(given)
    except ValidationError as error:
        at = error.errors()[0]
        raise ValueError(": ".join([f"rope_type {kind!r}", *map(str, at["loc"]), at["msg"]])) from error
    return scaling


def to_config(scaling: Scaling) -> dict[str, Any]:
    """Return the scaling as ``parse_scaling`` reads it, without the base."""
    kinds = {scaling_type: kind for kind, scaling_type in _KINDS.items()}
    return {"rope_type": kinds[type(scaling)], **asdict(scaling)}


def rotary_angles(positions_BT: Tensor, size: int, theta: float, scaling: Scaling | None) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [B, 1, T, E] of the rotary embedding at the given positions; E is ``size``."""
    half_e = torch.arange(0, size, 2, dtype=torch.float32, device=positions_BT.device)
    frequencies_e = theta ** (-half_e / size)
    if scaling is not None:
        frequencies_e = scaling.frequencies(frequencies_e, theta)
    angles = positions_BT[..., None].to(torch.float32) * frequencies_e
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    if scaling is None:
        return angles.cos(), angles.sin()
    return angles.cos() * scaling.magnitude, angles.sin() * scaling.magnitude


def rotate(x_BNTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding in the half-split layout of Llama."""
    low, high = x_BNTE.chunk(2, dim=-1)
    return x_BNTE * cos + torch.cat([-high, low], dim=-1) * sin
