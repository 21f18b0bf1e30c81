"""The spans of a commit, linked to the spans that published its records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipeline.batches import Record
from pipeline.offsets import Source
from schemas.telemetry.spans import MAX_LINKS, Span
from schemas.telemetry.trace_context import (
    TRACEPARENT,
    TraceContext,
    new_trace,
    parse_traceparent,
    request_context,
)


def commit_spans(
    records: Mapping[Source, Sequence[Record]],
    table_versions: Mapping[str, int],
    group_id: str,
    start: float,
    end: float,
) -> Iterator[Span]:
    """Return the spans of a commit, one for each run of records that one span can be linked to.

    Args:
        records: The committed records by partition, in the order of their offsets.
        table_versions: The version that the commit made, by table.
        group_id: The consumer group.
        start: Unix time at which the first row was built.
        end: Unix time at which the last table was committed.
    """
    context = new_trace()
    for source, of_partition in records.items():
        for first in range(0, len(of_partition), MAX_LINKS):
            run = of_partition[first : first + MAX_LINKS]
            yield Span(
                name=f"process {source.topic}",
                event="batch_committed",
                context=context.child(),
                start=start,
                end=end,
                kind="consumer",
                links=tuple(dict.fromkeys(map(_sender, run))),
                attributes={
                    "messaging.system": "kafka",
                    "messaging.operation.name": "process",
                    "messaging.operation.type": "process",
                    "messaging.destination.name": source.topic,
                    "messaging.destination.partition.id": str(source.partition),
                    "messaging.consumer.group.name": group_id,
                    "messaging.batch.message_count": len(run),
                    "first_offset": run[0].offset,
                    "last_offset": run[-1].offset,
                    **{f"version_of_{name}": version for name, version in table_versions.items()},
                },
            )


def _sender(record: Record) -> TraceContext:
    """Return the span of the record's header, or else the span of the request in its key."""
    header = next((value for name, value in record.headers if name == TRACEPARENT), None)
    return parse_traceparent(header) or request_context((record.key or b"").decode(errors="replace"))
