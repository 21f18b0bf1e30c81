"""The delay from a verify step to the first served version that was trained on it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from recorded import LINE, conversation, record_of, tables_of

from ops.bench.loop.learning_delay import (
    CommittedStep,
    Delays,
    ServedVersion,
    elapsed,
    first_served,
    measure_delays,
    read_served_versions,
    read_steps,
)
from ops.demo.record import Swap
from pipeline.delta import DeltaLog
from pipeline.offsets import SourcePartition, transaction_id
from schemas.settings import Settings, load
from trainer.data.held_out import is_held_out
from trainer.release.registration import PASSED_TAG
from trainer.release.registry import Version

RECORDED = 1_700_000_000
"""When every made-up verify step was committed."""


def test_a_verify_step_is_served_by_the_first_version_that_was_trained_on_its_record() -> None:
    in_order = [
        ServedVersion("1", 10, {0: 4}),
        ServedVersion("2", 20, {0: 9, 1: 3}),
        ServedVersion("3", 30, {0: 20, 1: 8}),
    ]
    assert first_served(CommittedStep(0, 0, 4), in_order) == 10
    assert first_served(CommittedStep(0, 0, 5), in_order) == 20
    assert first_served(CommittedStep(0, 1, 0), in_order) == 20
    assert first_served(CommittedStep(0, 1, 9), in_order) is None
    assert first_served(CommittedStep(0, 2, 0), in_order) is None


def test_versions_count_in_the_order_of_their_swaps() -> None:
    served = [ServedVersion("2", 20, {0: 9}), ServedVersion("1", 40, {0: 9})]
    found = measure_delays([CommittedStep(5, 0, 9)], served, [(0, 100)], young_s=0)
    assert found == Delays((15,), unserved=0, young=0)


@pytest.mark.parametrize(("moment", "learned"), [(0, 0), (10, 0), (15, 5), (20, 10), (35, 10), (42, 12), (99, 20)])
def test_the_clock_stops_while_the_trainer_is_stopped(moment: float, learned: float) -> None:
    assert elapsed([(10, 20), (40, 50)], moment) == learned


def test_a_delay_excludes_a_pause_of_the_trainer() -> None:
    found = measure_delays([CommittedStep(15, 0, 0)], [ServedVersion("1", 43, {0: 0})], [(10, 20), (40, 50)], young_s=0)
    assert found.seconds == (8,)


def test_a_verify_step_without_a_served_version_has_the_delay_so_far() -> None:
    found = measure_delays([CommittedStep(15, 0, 7)], [ServedVersion("1", 43, {0: 0})], [(10, 20), (40, 50)], young_s=0)
    assert found == Delays((15,), unserved=1, young=0)


def test_verify_steps_at_the_end_do_not_count() -> None:
    rows = [CommittedStep(10, 0, 0), CommittedStep(95, 0, 1)]
    found = measure_delays(rows, [ServedVersion("1", 96, {0: 1})], [(0, 100)], young_s=20)
    assert found == Delays((86,), unserved=0, young=1)


def test_without_learning_there_is_no_delay() -> None:
    assert measure_delays([], [], [], young_s=60) == Delays((), 0, 0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of tables to which three records were added, one in each commit."""
    made = load(environ={}, flags={"tables.uri": str(tmp_path), "kafka.traces_topic": "traces"})
    tables = DeltaLog(made.tables)
    for offset in range(3):
        rows = tables_of(record_of(f"request-{offset}", conversation(range(9), 4), offset))
        for name in ("traces", "accepted"):
            tables.snapshot(name).append(rows[name], {transaction_id(name, SourcePartition("traces", 0)): offset})
    return made


def test_the_offsets_of_a_version_are_those_that_it_was_trained_on_and_not_those_that_were_read(
    settings: Settings,
) -> None:
    registered = [
        Version(
            str(n),
            datetime.fromtimestamp(0, UTC),
            {"tables": json.dumps({"accepted": 3, "rejected": 0}), PASSED_TAG: str(trained_on)},
            card="",
            run="",
        )
        for n, trained_on in enumerate([1, 2, 2])
    ]
    registered.append(Version("9", datetime.fromtimestamp(0, UTC), {"imported_from": "elsewhere"}, card="", run=""))
    swaps = [Swap("1", 7.0, 0, 0.1), Swap("0", 3.0, 0, 0.1), Swap("1", 5.0, 0, 0.1), Swap("9", 2.0, 0, 0.1)]
    assert read_served_versions(settings, registered, swaps) == [
        ServedVersion("0", 3.0, {0: 0}),
        ServedVersion("1", 5.0, {0: 1}),
    ]


def test_held_out_requests_have_no_delay(settings: Settings) -> None:
    kept = [n for n in range(3) if not is_held_out(f"request-{n}", settings.train.held_out_ratio)]
    rows = read_steps(settings, LINE, RECORDED)
    assert sorted({row.offset for row in rows}) == kept
    assert {row.time for row in rows} == {RECORDED}
    assert not read_steps(settings, LINE, RECORDED + 1)
    assert not read_steps(settings, "another line", RECORDED)
