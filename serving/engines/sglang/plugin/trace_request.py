"""SGLang's request: its trace options, and the request as a ``Request``.

Both of SGLang's APIs pass ``custom_params`` of a request to the scheduler::

    {"custom_params": {"aurora_trace": "off"}}
    {"custom_params": {"aurora_label": "sql"}}
"""

from __future__ import annotations

from typing import Any

from serving.engines.base import Request
from serving.engines.plugin.trace_options import TraceOptions, Untraced, read_fields

_HEALTH = "HEALTH_CHECK"
_ALL_TOKENS = 1 << 30
"""SGLang's top-k without a limit."""


def read_options(req: Any) -> TraceOptions:
    """Return the options of SGLang's request."""
    untraced: Untraced | None = None
    if req.rid.startswith(_HEALTH):
        untraced = "health"
    elif req.lora_id is not None:
        untraced = "lora"  # its target differs from the line's
    elif req.multimodal_inputs is not None:
        untraced = "multimodal"  # its prompt has more than tokens
    elif len(req.output_ids):
        untraced = "retracted"
    return read_fields(req.sampling_params.custom_params, untraced)


def is_greedy(sampling: Any) -> bool:
    """Return whether a request with these parameters decodes greedily: SGLang turns temperature 0 into a top-k of 1."""
    return bool(sampling.top_k == 1)


def to_request(req: Any, options: TraceOptions) -> Request:
    """Return SGLang's request as a ``Request``."""
    sampling = req.sampling_params
    greedy = is_greedy(sampling)
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
