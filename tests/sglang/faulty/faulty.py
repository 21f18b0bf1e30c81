"""A second plugin that breaks ours: our hooks raise for requests with a certain name or parameter."""

from __future__ import annotations

from typing import Any

from serving.engines.sglang.plugin import trace_request

NAME = "faulty"


def register() -> None:
    """Replace functions that our plugin has not imported yet."""
    read_options, is_greedy = trace_request.read_options, trace_request.is_greedy

    def faulty_options(req: Any) -> Any:
        if req.rid.startswith(NAME):
            raise RuntimeError("raised on purpose")
        return read_options(req)

    def faulty_greedy(sampling: Any) -> bool:
        if NAME in (sampling.custom_params or {}):
            raise RuntimeError("raised on purpose")
        return is_greedy(sampling)

    trace_request.read_options, trace_request.is_greedy = faulty_options, faulty_greedy
