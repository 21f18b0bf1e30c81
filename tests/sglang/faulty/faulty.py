"""A second plugin that breaks ours: our hooks raise for requests with a certain name."""

from __future__ import annotations

from typing import Any

from serving.engines.sglang.plugin import trace_request

NAME = "faulty"


def register() -> None:
    """Replace a function that our plugin has not imported yet."""
    original = trace_request.read_options

    def faulty(req: Any) -> Any:
        if req.rid.startswith(NAME):
            raise RuntimeError("raised on purpose")
        return original(req)

    trace_request.read_options = faulty
