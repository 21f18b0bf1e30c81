"""A second plugin, which breaks ours: its hooks raise for requests of a certain name."""

from __future__ import annotations

from typing import Any

from serving.engines.sglang.plugin import trace_request

NAME = "faulty"


def register() -> None:
    """Put the fault where our plugin has not looked yet."""
    whole = trace_request.asked_of

    def faulty(req: Any) -> Any:
        if req.rid.startswith(NAME):
            raise RuntimeError("raised on purpose")
        return whole(req)

    trace_request.asked_of = faulty
