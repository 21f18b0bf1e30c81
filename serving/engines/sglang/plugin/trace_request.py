"""Trace options of a request, and SGLang's request as a ``Request``.

Both of SGLang's APIs pass ``custom_params`` of a request to the scheduler::

    {"custom_params": {"aurora_trace": "off"}}
    {"custom_params": {"aurora_label": "sql"}}

This module imports no metrics library: another plugin may import it while the plugins are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serving.engines.base import Request

TRACE, LABEL = "aurora_trace", "aurora_label"
_HEALTH = "HEALTH_CHECK"
_ALL_TOKENS = 1 << 30
"""SGLang's top-k without a limit."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """Whether a request is traced, and the label of its traffic."""

    untraced: str | None = None
    """Why the request is not traced; None if it is."""
    label: str | None = None


def read_options(req: Any) -> TraceOptions:
    """Return the options of SGLang's request."""
    custom = req.sampling_params.custom_params or {}
    if custom.get(TRACE) == "off":
        return TraceOptions("opt_out")
    if req.rid.startswith(_HEALTH):
        return TraceOptions("health")
    if req.lora_id is not None:
        return TraceOptions("lora")  # its target differs from the line's
    if req.multimodal_inputs is not None:
        return TraceOptions("multimodal")  # its prompt has more than tokens
    label = custom.get(LABEL)
    return TraceOptions(label=None if label is None else str(label))


def to_request(req: Any, options: TraceOptions) -> Request:
    """Return SGLang's request as a ``Request``. SGLang turns temperature 0 into a top-k of 1."""
    sampling = req.sampling_params
    greedy = sampling.top_k == 1
    return Request(
        id=req.rid,
        prompt=tuple(req.origin_input_ids),
        max_tokens=sampling.max_new_tokens or 0,
        temperature=0.0 if greedy else sampling.temperature,
        top_p=sampling.top_p,
        top_k=0 if greedy or sampling.top_k >= _ALL_TOKENS else sampling.top_k,
        seed=sampling.sampling_seed,
        label=options.label,
    )
