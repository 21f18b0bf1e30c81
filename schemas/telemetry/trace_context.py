"""What ties a request to the versions that learned from it: contexts in the form of W3C Trace Context.

A node writes the context of a request into the request's id, ``chatcmpl-<trace id><span id>``. The id is the key of its
messages and stands in every row, so whoever has a row has the trace. Messages carry the same as a ``traceparent``
header, for consumers that are not ours.

A version has a trace of its own, which follows from its line and number: trainer, promoter and nodes name it without
asking each other. Links lead from there to the requests that it was trained on.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, replace

HEADER = "traceparent"
"""Of HTTP requests and of Kafka messages."""

_FORM = re.compile(r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})")
_IN_REQUEST = re.compile(r"-(?P<trace>[0-9a-f]{32})(?P<span>[0-9a-f]{16})(-\d+)?$")
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span of one trace."""

    trace: str
    """32 hexadecimal digits."""
    span: str
    """16 hexadecimal digits."""
    sampled: bool = True
    """Whether its spans are wanted."""

    def header(self) -> str:
        """As the value of ``traceparent``."""
        return f"00-{self.trace}-{self.span}-{int(self.sampled):02x}"

    def child(self) -> TraceContext:
        """A new span of the same trace."""
        return replace(self, span=secrets.token_hex(8))

    def request_id(self, prefix: str) -> str:
        """The id of the request whose span this is."""
        return f"{prefix}-{self.trace}{self.span}"


def begun() -> TraceContext:
    """The first span of a new trace."""
    return TraceContext(secrets.token_hex(16), secrets.token_hex(8))


def read(header: str | bytes | None) -> TraceContext | None:
    """What a ``traceparent`` says; None where there is none, or it is not of the standard's form."""
    text = header.decode("latin-1") if isinstance(header, bytes) else header or ""
    found = _FORM.match(text.strip())
    if found is None or found["version"] == "ff" or not int(found["trace"], 16) or not int(found["span"], 16):
        return None
    # A version to come may add fields behind a dash, and nothing else.
    rest = text.strip()[found.end() :]
    if rest and (found["version"] == "00" or not rest.startswith("-")):
        return None
    return TraceContext(found["trace"], found["span"], bool(int(found["flags"], 16) & _SAMPLED))


def of_request(request: str) -> TraceContext:
    """The span of a request, by its id; an id that another server gave stands for a trace of its own."""
    if found := _IN_REQUEST.search(request):
        return TraceContext(found["trace"], found["span"])
    return _named(request)


def of_version(line: str, version: str) -> TraceContext:
    """The span in which a version was registered."""
    return _named(f"{line}/{version}")


def _named(name: str) -> TraceContext:
    digest = hashlib.blake2b(name.encode(), digest_size=24).hexdigest()
    return TraceContext(digest[:32], digest[32:])
