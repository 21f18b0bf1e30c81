"""Tests of the drift monitor: state rebuilt from the table, events sent at least once, failures without effect."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.delta import TableError
from pipeline.drift import monitor as drift_monitor
from pipeline.drift.detector import TRACE_COLUMNS
from pipeline.drift.monitor import RESEND_RECORDS, SHOWN_TRAFFIC, DriftEventProducer, DriftMonitor
from pipeline.metrics import drift_metrics
from pipeline.offsets import SourcePartition
from schemas.batches import TRACES
from schemas.events import DriftEvent
from schemas.settings import Drift, Kafka

SOURCE, OTHER = SourcePartition("traces", 0), SourcePartition("traces", 1)
RECORDS = 6_000
SHIFT = 4_000


class Table:
    """The table ``traces``."""

    def __init__(self, rows: pa.Table) -> None:
        self.rows = rows
        self.fails: Exception | None = None
        self.read: list[range] = []

    def read_offsets(self, name: str, source: SourcePartition, offsets: range, columns: tuple[str, ...]) -> pa.Table:
        assert (name, columns) == ("traces", TRACE_COLUMNS)
        if self.fails:
            raise self.fails
        self.read.append(offsets)
        return self.of(offsets)

    def of(self, offsets: range) -> pa.Table:
        at = self.rows["offset"]
        return self.rows.filter(pc.and_(pc.greater_equal(at, offsets.start), pc.less(at, offsets.stop)))


class Sent:
    """Keeps the events that are sent."""

    dropped = 0

    def __init__(self) -> None:
        self.events: list[DriftEvent] = []

    def send(self, event: DriftEvent) -> None:
        self.events.append(event)

    def poll(self) -> None:
        pass


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    """Return one request of four verify steps per record. Its draft token is accepted less often from ``SHIFT`` on."""
    rng = np.random.default_rng(0)
    n = 4 * RECORDS
    accepted = rng.random(n) < np.where(np.arange(n) < 4 * SHIFT, 0.7, 0.4)
    columns = {
        "offset": np.repeat(np.arange(RECORDS), 4),
        "verify_step": np.tile(np.arange(1, 5), RECORDS),
        "line": ["line"] * n,
        "label": ["sql"] * n,
        "speculator": ["7"] * n,
        "time": np.repeat(np.arange(RECORDS), 4) * 10**6,
        "draft_parents": [[-1]] * n,
        "draft_sources": [None] * n,
        "accepted": [[0] if one else [] for one in accepted],
    }
    fields = [TRACES.field(name) for name in TRACE_COLUMNS]
    return pa.table([pa.array(columns[f.name], f.type) for f in fields], pa.schema(fields))


def commits(offsets: range, rng: np.random.Generator) -> Iterator[range]:
    cuts = np.unique([offsets.start, *rng.integers(offsets.start, offsets.stop, 20), offsets.stop]).tolist()
    return (range(start, stop) for start, stop in pairwise(cuts))


def run(monitor: DriftMonitor, table: Table, offsets: range, source: SourcePartition = SOURCE) -> None:
    for commit in commits(offsets, np.random.default_rng(offsets.start)):
        monitor.observe(source, commit, table.of(commit))


@pytest.fixture
def uninterrupted(rows: pa.Table) -> tuple[list[DriftEvent], DriftMonitor]:
    sent = Sent()
    monitor = DriftMonitor(Drift(), Table(rows), sent)
    run(monitor, Table(rows), range(RECORDS))
    return sent.events, monitor


Uninterrupted = tuple[list[DriftEvent], DriftMonitor]


def test_next_worker_continues_with_the_same_state(rows: pa.Table, uninterrupted: Uninterrupted) -> None:
    [event], before = uninterrupted
    assert SHIFT < event.offset < SHIFT + 200
    sent, table = Sent(), Table(rows)
    monitor = DriftMonitor(Drift(), table, sent)
    run(monitor, table, range(SHIFT + 10, RECORDS))
    assert sent.events == [event]
    assert monitor.status() == before.status()
    assert len(table.read) == 1


@pytest.mark.parametrize(("late", "again"), [(1, True), (RESEND_RECORDS, True), (RESEND_RECORDS + 1, False)])
def test_events_of_the_newest_records_are_resent_unchanged(
    rows: pa.Table, uninterrupted: Uninterrupted, *, late: int, again: bool
) -> None:
    [event], _ = uninterrupted
    sent, table = Sent(), Table(rows)
    monitor = DriftMonitor(Drift(), table, sent)
    run(monitor, table, range(event.offset + late, RECORDS))
    assert [one.model_dump_json() for one in sent.events] == ([event.model_dump_json()] if again else [])


def test_state_is_rebuilt_after_another_worker_committed_records(rows: pa.Table, uninterrupted: Uninterrupted) -> None:
    events, before = uninterrupted
    sent, table = Sent(), Table(rows)
    monitor = DriftMonitor(Drift(), table, sent)
    run(monitor, table, range(3_000))
    run(monitor, table, range(5_000, RECORDS))
    assert sent.events == events
    assert monitor.status() == before.status()


def test_status_combines_partitions_that_are_observed_separately(rows: pa.Table) -> None:
    sent, table = Sent(), Table(rows)
    monitor = DriftMonitor(Drift(), table, sent)
    run(monitor, table, range(3_000))
    [alone] = monitor.status().traffic
    run(monitor, table, range(1_000), OTHER)
    [both] = monitor.status().traffic
    assert (alone.acceptance.requests, both.acceptance.requests) == (3_000, 4_000)
    assert both.acceptance.first_token_acceptance == pytest.approx(0.7, abs=0.02)
    monitor.retain([OTHER])
    [other] = monitor.status().traffic
    assert other.acceptance.requests == 1_000


def test_status_shows_the_labels_with_the_most_requests(rows: pa.Table) -> None:
    head = rows.slice(0, 4 * 300)
    labels = [f"label-{offset % 60 if offset < 120 else 7}" for offset in head["offset"].to_pylist()]
    many = head.set_column(head.schema.get_field_index("label"), "label", pa.array(labels))
    monitor = DriftMonitor(Drift(), Table(many), Sent())
    run(monitor, Table(many), range(300))
    traffic = monitor.status().traffic
    assert len(traffic) == SHOWN_TRAFFIC
    assert (traffic[0].label, traffic[0].acceptance.requests) == ("label-7", 182)


@pytest.mark.parametrize("failure", [TableError("the store is unreachable"), ValueError("an unexpected error")])
def test_failure_is_counted_and_the_next_commit_rebuilds_the_state(
    rows: pa.Table, uninterrupted: Uninterrupted, failure: Exception
) -> None:
    events, before = uninterrupted
    sent, table = Sent(), Table(rows)
    monitor = DriftMonitor(Drift(), table, sent)
    table.fails = failure
    run(monitor, table, range(1, 4_500))
    assert (sent.events, monitor.status().traffic) == ([], [])
    assert monitor.status().failed > 0
    table.fails = None
    run(monitor, table, range(4_500, RECORDS))
    assert sent.events == events
    assert monitor.status().traffic == before.status().traffic


def test_undeliverable_events_are_counted_as_dropped(
    uninterrupted: Uninterrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    [event], _ = uninterrupted
    monkeypatch.setattr(drift_monitor, "MAX_QUEUED_EVENTS", 2)
    topic = DriftEventProducer(Kafka(bootstrap_servers="127.0.0.1:1"))
    for _ in range(3):
        topic.send(event)
    topic.poll()
    assert topic.dropped == 1


def test_event_is_parsed_from_its_json(uninterrupted: Uninterrupted) -> None:
    [event], _ = uninterrupted
    assert DriftEvent.model_validate_json(event.model_dump_json()) == event
    assert event.key == "line/7"


def test_metrics_export_acceptance_and_events(uninterrupted: Uninterrupted) -> None:
    _, monitor = uninterrupted
    samples = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for metric in drift_metrics(monitor.status())
        for sample in metric.samples
    }
    [shown] = monitor.status().traffic
    key = ("line", "7", "sql")
    assert samples == {
        ("aurora_stream_drift_events_total", ()): 1,
        ("aurora_stream_drift_events_dropped_total", ()): 0,
        ("aurora_stream_first_token_acceptance_ratio", key): shown.acceptance.first_token_acceptance,
        ("aurora_stream_acceptance_length", key): shown.acceptance.acceptance_length,
    }
