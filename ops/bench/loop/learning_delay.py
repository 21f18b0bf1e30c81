"""How long traffic takes to have an effect: from a verify step to the first served version that was trained on it.

Everything is read from what the loop itself records. A verify step has its time, and arrived in one Kafka record. The
tag ``passed`` of a version names the version of ``accepted`` of which every sample had been trained on, and the
application transactions of that version name the last record that it contains. The node reports when it swapped the
version in. Held-out requests are excluded: they are not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ops.demo.record import Swap
from pipeline.delta import DeltaLog
from pipeline.offsets import SourcePartition
from schemas.settings import Settings
from trainer.data.held_out import is_held_out
from trainer.release.registration import PASSED_TAG
from trainer.release.registry import Version

Span = tuple[float, float]
"""Start and end, in Unix seconds."""


@dataclass(frozen=True, slots=True)
class CommittedStep:
    """A verify step: the time of its commit, and the record in which it arrived."""

    time: float
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """A version that a node served, and the records that it was trained on."""

    version: str
    time: float
    """Of its first swap."""
    last_offsets: Mapping[int, int]
    """By partition."""


@dataclass(frozen=True, slots=True)
class Delays:
    """The delays of all verify steps."""

    seconds: tuple[float, ...]
    """Of every verify step that is old enough; of one without a served version the delay so far."""
    unserved: int
    """Verify steps without a served version."""
    young: int
    """Verify steps left out because the run ended too soon after them."""


def measure_delays(
    steps: Sequence[CommittedStep], served: Sequence[ServedVersion], learning: Sequence[Span], young_s: float
) -> Delays:
    """Measure the delays by a clock that stops outside of ``learning``.

    A verify step counts if at least ``young_s`` were left after it: otherwise the fast ones at the end would represent
    the slow ones, which had no time left.
    """
    end = elapsed(learning, learning[-1][1]) if learning else 0.0
    seconds, unserved, young = [], 0, 0
    in_order = sorted(served, key=lambda version: version.time)
    for step in steps:
        committed = elapsed(learning, step.time)
        if end - committed < young_s:
            young += 1
        elif (at := first_served(step, in_order)) is not None:
            seconds.append(elapsed(learning, at) - committed)
        else:
            unserved += 1
            seconds.append(end - committed)
    return Delays(tuple(seconds), unserved, young)


def first_served(step: CommittedStep, in_order: Sequence[ServedVersion]) -> float | None:
    """Return the time of the first swap, in the order of the swaps, to a version whose tables hold the record."""
    return next((v.time for v in in_order if v.last_offsets.get(step.partition, -1) >= step.offset), None)


def elapsed(learning: Sequence[Span], moment: float) -> float:
    """Return the seconds of learning before a moment."""
    return sum(min(end, moment) - start for start, end in learning if start < moment)


def read_steps(settings: Settings, line: str, since: float) -> list[CommittedStep]:
    """Return the verify steps of a line since a moment that are not held out. Raises ``TableError``."""
    tables, columns = DeltaLog(settings.tables), ["line", "request", "partition", "offset", "time"]
    rows = tables.read("traces", columns).to_pylist()
    start, ratio = datetime.fromtimestamp(since, UTC), settings.train.held_out_ratio
    chunks = tables.read("accepted", ["request", "prompt_key"]).to_pylist()
    held_out = {row["request"] for row in chunks if is_held_out(row["prompt_key"] or row["request"], ratio)}
    return [
        CommittedStep(row["time"].timestamp(), row["partition"], row["offset"])
        for row in rows
        if row["line"] == line and row["time"] >= start and row["request"] not in held_out
    ]


def read_served_versions(
    settings: Settings, registered: Sequence[Version], swaps: Sequence[Swap]
) -> list[ServedVersion]:
    """Return the versions that were swapped in, with the records they were trained on; imported ones have none.

    Raises:
        TableError: the tables cannot be read.
    """
    log = DeltaLog(settings.tables)
    first = {swap.version: swap.time for swap in sorted(swaps, key=lambda swap: swap.time, reverse=True)}
    return [
        ServedVersion(
            version.number, first[version.number], _last_offsets(log, settings, int(version.tags[PASSED_TAG]))
        )
        for version in registered
        if version.number in first and PASSED_TAG in version.tags
    ]


def _last_offsets(log: DeltaLog, settings: Settings, accepted: int) -> dict[int, int]:
    """Return the last offset of each partition in a version of ``accepted``."""
    topic, partitions = settings.kafka.traces_topic, range(settings.kafka.partitions)
    last = {p: log.last_offset("accepted", SourcePartition(topic, p), accepted) for p in partitions}
    return {partition: offset for partition, offset in last.items() if offset >= 0}
