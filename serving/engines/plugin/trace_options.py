"""Trace options of a request, which a client passes in the server's own field for extensions.

This module imports no metrics library: another plugin may import it while plugins are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TRACE, LABEL = "aurora_trace", "aurora_label"
Untraced = Literal[
    "opt_out", "capture_limit", "health", "lora", "multimodal", "no_tokens", "retracted", "mixed", "continued"
]
"""Why a request is not traced, or only in part."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """Whether a request is traced, and the label of its traffic."""

    untraced: Untraced | None = None
    """Why the request is not traced; None if it is."""
    label: str | None = None


def read_fields(fields: Mapping[str, Any] | None, untraced: Untraced | None = None) -> TraceOptions:
    """Return the options that a client gives in ``fields``; ``untraced`` is a reason of the server's own."""
    given = fields or {}
    if given.get(TRACE) == "off":
        return TraceOptions("opt_out")
    label = given.get(LABEL)
    return TraceOptions(untraced, None if untraced or label is None else str(label))
