"""When a stream worker is live and ready, and how long its partitions are said to wait."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from pipeline.health import JOINING_S, LATE_S, STORE_S, Vitals, not_live, not_ready
from pipeline.offsets import Source
from pipeline.progress import Progress
from pipeline.worker import HELD_BYTES, _app
from schemas.settings import Kafka, Settings, Stream

WELL = Vitals(unwatched_s=1, joining_s=0, storing_s=0, waiting_s={}, unknown=(), error=None)
ZERO, ONE = Source("traces", 0), Source("traces", 1)


@pytest.mark.parametrize(
    ("seen", "live", "ready"),
    [
        (WELL, True, True),
        (replace(WELL, waiting_s={0: LATE_S - 1}), True, True),
        (replace(WELL, waiting_s={0: LATE_S + 1}), False, False),
        (replace(WELL, joining_s=JOINING_S - 1), True, False),
        (replace(WELL, joining_s=JOINING_S + 1), False, False),
        (replace(WELL, storing_s=STORE_S - 1), True, True),
        (replace(WELL, storing_s=STORE_S + 1), False, False),
        (replace(WELL, unwatched_s=2 * LATE_S), False, False),
        (replace(WELL, unknown=(1,)), True, False),
        (replace(WELL, error="the table does not answer (tables.uri)"), True, False),
    ],
)
def test_what_lasts_too_long_is_not_live_and_what_is_in_the_way_not_ready(
    seen: Vitals, live: bool, ready: bool
) -> None:
    assert (not not_live(seen), not not_ready(seen)) == (live, ready)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def progress() -> tuple[Progress, Clock]:
    """Two partitions with ten records each, of which the tables hold none."""
    clock = Clock()
    made = Progress(clock)
    made.assign([ZERO, ONE])
    for source in (ZERO, ONE):
        made.wants(source, 0)
        made.reaches(source, 0, 10)
    return made, clock


def test_a_partition_waits_while_records_are_there_and_none_has_arrived() -> None:
    made, clock = progress()
    made.arrived(ONE)
    clock.now += 7
    assert (made.waiting_s(ZERO), made.waiting_s(ONE)) == (7, 0)
    assert made.overdue(5) == [ZERO]
    made.done_with(ONE)
    clock.now += 3
    assert (made.waiting_s(ZERO), made.waiting_s(ONE)) == (10, 3)


def test_a_partition_that_is_read_to_its_end_does_not_wait() -> None:
    made, clock = progress()
    made.wants(ZERO, 10)
    clock.now += 100
    assert made.waiting_s(ZERO) == 0
    made.reaches(ZERO, 0, 11)
    clock.now += 2
    assert made.waiting_s(ZERO) == 2


def test_nobody_waits_for_what_could_not_come() -> None:
    made, clock = progress()
    clock.now += 100
    made.excuse()
    clock.now += 1
    assert made.waiting_s(ZERO) == 1


def test_a_record_that_was_asked_for_is_given_time_to_come() -> None:
    made, clock = progress()
    clock.now += 6
    assert made.overdue(5) == [ZERO, ONE]
    made.asked(ZERO)
    clock.now += 4
    assert made.overdue(5) == [ONE]
    clock.now += 2
    assert made.overdue(5) == [ZERO, ONE]


def test_a_partition_is_looked_at_until_its_log_and_the_tables_agree() -> None:
    made, _ = progress()
    assert not made.unsettled()
    made.reaches(ZERO, 3, 10)
    assert made.unsettled() == [ZERO]
    made.wants(ZERO, 3)
    made.reaches(ZERO, 3, 10)
    assert not made.unsettled()
    made.reaches(ONE, 0, 10)
    made.assign([ONE])
    assert made.unknown() == made.unsettled() == [ONE]


def test_what_is_not_assigned_is_not_spoken_of() -> None:
    made, _ = progress()
    made.assign([ONE])
    made.arrived(ZERO)
    made.done_with(ZERO)
    made.wants(ZERO, 5)
    made.reaches(ZERO, 0, 9)
    assert made.sources() == [ONE]
    assert not made.statuses()


@pytest.mark.parametrize("largest", [10_000, 1_000_000, 64 << 20])
def test_faust_holds_no_more_bytes_than_the_inbox_or_a_single_message(largest: int) -> None:
    conf = _app(Settings(kafka=Kafka(max_message_bytes=largest), stream=Stream(flush_records=1_000))).conf
    assert conf.stream_buffer_maxsize * largest <= max(HELD_BYTES, largest)
    assert conf.broker_max_poll_records * largest <= max(HELD_BYTES, largest)


def test_a_worker_that_reads_nothing_for_days_stays_in_its_group() -> None:
    assert _app(Settings()).conf.broker_max_poll_interval > 30 * 86400


def test_a_worker_that_is_done_ends_although_a_call_hangs_and_says_which() -> None:
    program = (
        "import threading, time\n"
        "from pipeline.health import LastCall\n"
        "def hanging(): time.sleep(600)\n"
        "threading.Thread(target=hanging).start()\n"
        "LastCall(patience_s=0.1).start()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0
    assert "in hanging" in ended.stderr
    assert "ended_in_the_middle_of_a_call" in ended.stdout + ended.stderr
