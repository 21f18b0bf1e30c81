"""What a client asks of its request's trace, and the request as our records name it.

SGLang hands ``custom_params`` of a request on to its scheduler, from both of its APIs::

    {"custom_params": {"aurora_trace": "off"}}
    {"custom_params": {"aurora_label": "sql"}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serving.engines.base import Request

TRACE, LABEL = "aurora_trace", "aurora_label"
_HEALTH = "HEALTH_CHECK"
_EVERY_TOKEN = 1 << 30
"""SGLang's top-k where there is none."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Why a request is not traced, if it is not, and the label of its traffic."""

    untraced: str | None = None
    label: str | None = None


def asked_of(req: Any) -> Asked:
    """Of SGLang's request."""
    custom = req.sampling_params.custom_params or {}
    if custom.get(TRACE) == "off":
        return Asked("asked")
    if req.rid.startswith(_HEALTH):
        return Asked("health")
    if req.lora_id is not None:
        return Asked("lora")  # its target is another than the line's
    if req.multimodal_inputs is not None:
        return Asked("multimodal")  # its prompt is more than tokens
    label = custom.get(LABEL)
    return Asked(label=None if label is None else str(label))


def request_of(req: Any, asked: Asked) -> Request:
    """SGLang's request as ours. It turns temperature 0 into a top-k of 1."""
    sampling = req.sampling_params
    greedy = sampling.top_k == 1
    return Request(
        id=req.rid,
        prompt=tuple(req.origin_input_ids),
        max_tokens=sampling.max_new_tokens or 0,
        temperature=0.0 if greedy else sampling.temperature,
        top_p=sampling.top_p,
        top_k=0 if greedy or sampling.top_k >= _EVERY_TOKEN else sampling.top_k,
        seed=sampling.sampling_seed,
        label=asked.label,
    )
