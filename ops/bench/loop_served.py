"""How long traffic waits for what it teaches: from a verify step to the first version that learned from it and serves.

Everything is read from what the loop itself recorded. A verify step has its time, and came in one Kafka record. The tag
``tables`` of a version names the state of ``accepted`` up to which the trainer had read, and that state's application
transactions name the last record that it contains. The node tells when it swapped the version in. Requests that the
trainer holds back are left out: nothing is learned from them.

What the trainer has read it trains on within its next steps, so a version may have seen the newest few of its rows
without a step over them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ops.demo.record import Swap
from pipeline.delta import DeltaLog, TableSnapshot
from pipeline.offsets import SourcePartition, transaction_id
from schemas.settings import Settings
from trainer.data.data_loader import is_held_out
from trainer.release.registry import Version

Span = tuple[float, float]
"""From when to when, in Unix seconds."""


@dataclass(frozen=True, slots=True)
class Row:
    """A verify step: when it was committed, and the record that it came in."""

    time: float
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class Served:
    """A version that a node began to serve, and what had been read for it."""

    version: str
    time: float
    """When it was swapped in for the first time."""
    reach: Mapping[int, int]
    """Last offset by partition."""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long rows waited."""

    seconds: tuple[float, ...]
    """Of every row that is old enough; of one that is not served yet as long as it has waited so far."""
    unserved: int
    """How many of them wait still."""
    young: int
    """Rows left out because the run ended too soon after them."""


def waits(rows: Sequence[Row], served: Sequence[Served], learning: Sequence[Span], young_s: float) -> Waits:
    """The waits of rows by a clock that stands still outside of ``learning``.

    A row counts if at least ``young_s`` were left for it: rows of the end that happened to be quick would otherwise
    speak for those that had no time to be slow.
    """
    end = elapsed(learning, learning[-1][1]) if learning else 0.0
    seconds, unserved, young = [], 0, 0
    in_order = sorted(served, key=lambda version: version.time)
    for row in rows:
        recorded = elapsed(learning, row.time)
        if end - recorded < young_s:
            young += 1
        elif (at := first_served(row, in_order)) is not None:
            seconds.append(elapsed(learning, at) - recorded)
        else:
            unserved += 1
            seconds.append(end - recorded)
    return Waits(tuple(seconds), unserved, young)


def first_served(row: Row, in_order: Sequence[Served]) -> float | None:
    """When the first version was swapped in whose tables hold the row's record; None if none was.

    Args:
        row: The row.
        in_order: Versions by the time at which they were swapped in.
    """
    return next((v.time for v in in_order if v.reach.get(row.partition, -1) >= row.offset), None)


def elapsed(learning: Sequence[Span], moment: float) -> float:
    """Seconds of learning up to a moment."""
    return sum(min(end, moment) - start for start, end in learning if start < moment)


def read_rows(settings: Settings, line: str, since: float) -> list[Row]:
    """The verify steps of a line since a moment that the trainer may learn from. Raises ``TableError``."""
    columns = ["line", "request", "partition", "offset", "time"]
    found = DeltaLog(settings.tables).read("traces", columns).to_pylist()
    begin, share = datetime.fromtimestamp(since, UTC), settings.train.held_out_ratio
    return [
        Row(row["time"].timestamp(), row["partition"], row["offset"])
        for row in found
        if row["line"] == line and row["time"] >= begin and not is_held_out(row["request"], share)
    ]


def read_served(settings: Settings, registered: Sequence[Version], swaps: Sequence[Swap]) -> list[Served]:
    """The versions that were swapped in, with what had been read for them. Raises ``TableError``."""
    tables = DeltaLog(settings.tables)
    first = {swap.version: swap.time for swap in sorted(swaps, key=lambda swap: swap.time, reverse=True)}
    return [
        Served(version.number, first[version.number], _reach(tables, settings, json.loads(version.tags["tables"])))
        for version in registered
        if version.number in first
    ]


def _reach(tables: DeltaLog, settings: Settings, read: Mapping[str, int]) -> dict[int, int]:
    """Last offset of each partition in the state of ``accepted`` that was read."""
    table = tables.open("accepted")
    with tables.translate_errors("accepted"):
        table.load_as_version(read["accepted"])
    state = TableSnapshot(table)
    topic, partitions = settings.kafka.traces_topic, range(settings.kafka.partitions)
    found = {p: state.transaction(transaction_id("accepted", SourcePartition(topic, p))) for p in partitions}
    return {partition: last for partition, last in found.items() if last is not None}
