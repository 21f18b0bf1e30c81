"""What a stream worker tells of a commit: spans linked to those that published its messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipeline.batches import Record
from pipeline.offsets import Source
from schemas.telemetry import trace_context
from schemas.telemetry.spans import LINKS, Span
from schemas.telemetry.trace_context import TraceContext


def spans_of(
    taken: Mapping[Source, Sequence[Record]], versions: Mapping[str, int], start: float, end: float
) -> Iterator[Span]:
    """The spans of a commit, one for each run of records that a span can be linked to.

    Args:
        taken: Its records, by partition in the order of their offsets.
        versions: By table, the version that the commit made.
        start: Unix time at which its rows began to be built.
        end: At which the last table had them.
    """
    context = trace_context.begun()
    for source, records in taken.items():
        for at in range(0, len(records), LINKS):
            part = records[at : at + LINKS]
            yield Span(
                name="commit",
                context=context.child(),
                start=start,
                end=end,
                kind="consumer",
                links=tuple(dict.fromkeys(map(_published_by, part))),
                attributes={
                    "topic": source.topic,
                    "partition": source.partition,
                    "first_offset": part[0].offset,
                    "last_offset": part[-1].offset,
                    **{f"version_of_{name}": version for name, version in versions.items()},
                },
            )


def _published_by(record: Record) -> TraceContext:
    """By its header; a node that sends none is known by the request, and anything else by its bytes."""
    header = next((value for name, value in record.headers if name == trace_context.HEADER), None)
    return trace_context.read(header) or trace_context.of_request((record.key or b"").decode(errors="replace"))
