"""The log of every process: JSON lines on stderr with time, level, process, event, and the trace where there is one."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from schemas.telemetry.trace_context import request_context, version_context


def configure(process: str, level: str = "info") -> None:
    """Send the entries of structlog and of the standard library's loggers to stderr as JSON lines."""

    # A context variable would exist on the main thread only.
    def add_process(_logger: Any, _method: str, event: EventDict) -> EventDict:
        return {"process": process, **event}

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_process,
        add_trace,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


def add_trace(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Add ``trace_id`` and ``span_id`` to an entry about a request, or about a version of a line."""
    match event:
        case {"trace_id": _}:
            return event
        case {"request": str(request)}:
            context = request_context(request)
        case {"line": str(line), "version": str(version)}:
            context = version_context(line, version)
        case _:
            return event
    return {**event, "trace_id": context.trace_id, "span_id": context.span_id}
