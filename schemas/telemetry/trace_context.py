"""W3C trace contexts that tie a request to the speculator versions trained on it.

A node writes the context of a request into the request id, ``chatcmpl-<trace id><span id>``. The request id is the key
of its Kafka messages and a column of every table, so each row leads to its trace. Messages also carry a ``traceparent``
header, for consumers outside Aurora.

A version has its own trace. Its ids follow from its line and number, so trainer, promoter and nodes derive the same
context independently. Span links connect the version to the requests that it was trained on.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, replace

TRACEPARENT = "traceparent"
"""Header of HTTP requests and Kafka messages that carries a context."""

_TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace_id>[0-9a-f]{32})-(?P<span_id>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_REQUEST_ID = re.compile(r"-(?P<trace_id>[0-9a-f]{32})(?P<span_id>[0-9a-f]{16})(-\d+)?$")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span of one trace."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    sampled: bool = True
    """Whether the spans of the trace are exported."""

    def to_traceparent(self) -> str:
        """Return the context as the value of a ``traceparent`` header."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    def child(self) -> TraceContext:
        """Return a new span of the same trace."""
        return replace(self, span_id=secrets.token_hex(8))

    def to_request_id(self, prefix: str) -> str:
        """Return the id of the request that this span describes."""
        return f"{prefix}-{self.trace_id}{self.span_id}"


def new_trace() -> TraceContext:
    """Return the root span of a new trace."""
    return TraceContext(secrets.token_hex(16), secrets.token_hex(8))


def parse_traceparent(header: str | bytes | None) -> TraceContext | None:
    """Return the context in a ``traceparent`` header; None if it is missing or malformed."""
    text = (header.decode("latin-1") if isinstance(header, bytes) else header or "").strip()
    fields = _TRACEPARENT.match(text)
    if fields is None or fields["version"] == "ff" or not int(fields["trace_id"], 16) or not int(fields["span_id"], 16):
        return None
    # A later version of the standard may append fields, each after a dash.
    rest = text[fields.end() :]
    if rest and (fields["version"] == "00" or not rest.startswith("-")):
        return None
    return TraceContext(fields["trace_id"], fields["span_id"], bool(int(fields["flags"], 16) & _SAMPLED))


def request_context(request: str) -> TraceContext:
    """Return the span of a request, read from its id; an id of another server maps to a trace of its own."""
    if fields := _REQUEST_ID.search(request):
        return TraceContext(fields["trace_id"], fields["span_id"])
    return _derived_context(request)


def version_context(line: str, version: str) -> TraceContext:
    """Return the span of the registration of a version."""
    return _derived_context(f"{line}/{version}")


def _derived_context(name: str) -> TraceContext:
    digest = hashlib.blake2b(name.encode(), digest_size=24).hexdigest()
    return TraceContext(digest[:32], digest[32:])
