"""Tests of liveness, readiness and the progress of partitions."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from pipeline.health import (
    JOIN_TIMEOUT_S,
    PAUSE_RETRY_S,
    PROGRESS_TIMEOUT_S,
    TRANSACTION_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    HealthSnapshot,
    ProgressTracker,
    liveness_problems,
    readiness_problems,
)
from pipeline.offsets import LogRange, SourcePartition

WELL = HealthSnapshot(
    unwatched_s=1, joining_s=0, writing_s=0, stalled_s={}, transaction_s={}, without_offset=(), paused={}, error=None
)
ZERO, ONE = SourcePartition("traces", 0), SourcePartition("traces", 1)


@pytest.mark.parametrize(
    ("seen", "live", "ready"),
    [
        (WELL, True, True),
        (replace(WELL, stalled_s={0: PROGRESS_TIMEOUT_S - 1}), True, True),
        (replace(WELL, stalled_s={0: PROGRESS_TIMEOUT_S + 1}), False, False),
        (replace(WELL, transaction_s={0: TRANSACTION_TIMEOUT_S - 1}), True, True),
        (replace(WELL, transaction_s={0: TRANSACTION_TIMEOUT_S + 1}), True, False),
        (replace(WELL, joining_s=JOIN_TIMEOUT_S - 1), True, False),
        (replace(WELL, joining_s=JOIN_TIMEOUT_S + 1), False, False),
        (replace(WELL, writing_s=WRITE_TIMEOUT_S - 1), True, True),
        (replace(WELL, writing_s=WRITE_TIMEOUT_S + 1), False, False),
        (replace(WELL, unwatched_s=2 * PROGRESS_TIMEOUT_S), False, False),
        (replace(WELL, without_offset=(1,)), True, False),
        (replace(WELL, paused={1: "aurora.trace/4"}), True, False),
        (replace(WELL, error="the table does not answer (tables.uri)"), True, False),
    ],
)
def test_liveness_and_readiness_follow_from_durations(seen: HealthSnapshot, live: bool, ready: bool) -> None:
    assert (not liveness_problems(seen), not readiness_problems(seen)) == (live, ready)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_paused_partition_is_live_not_stalled_and_read_again_until_its_next_offset_moves() -> None:
    tracker, clock = progress()
    tracker.set_next_offset(ZERO, 3)
    assert tracker.pause(ZERO, "aurora.trace/4")
    assert not tracker.pause(ZERO, "aurora.trace/4")
    clock.now += PAUSE_RETRY_S - 1
    assert (tracker.paused(), tracker.stalled_s(ZERO)) == ({0: "aurora.trace/4"}, 0)
    assert ZERO not in tracker.stalled(5)
    clock.now += 2
    assert ZERO in tracker.stalled(5)
    tracker.record_seek(ZERO)
    assert ZERO not in tracker.stalled(5)
    tracker.set_next_offset(ZERO, 4)
    assert tracker.paused() == {}


def progress() -> tuple[ProgressTracker, Clock]:
    """Return a tracker of two partitions with ten records each that are not in the tables."""
    clock = Clock()
    made = ProgressTracker(clock)
    made.assign([ZERO, ONE])
    for source in (ZERO, ONE):
        made.set_next_offset(source, 0)
        made.set_log(source, LogRange(0, 10, 10))
    return made, clock


def test_partition_is_stalled_while_records_wait_and_the_next_one_does_not_arrive() -> None:
    made, clock = progress()
    made.add_buffered(ONE, 0, 1.0)
    clock.now += 7
    assert (made.stalled_s(ZERO), made.stalled_s(ONE)) == (7, 0)
    assert made.stalled(5) == [ZERO]
    made.remove_buffered(ONE, 0)
    clock.now += 3
    assert (made.stalled_s(ZERO), made.stalled_s(ONE)) == (10, 3)


def test_partition_is_stalled_while_only_later_records_arrive() -> None:
    made, clock = progress()
    for offset in range(1, 10):
        made.add_buffered(ZERO, offset, 1.0)
        clock.now += 2
        made.remove_buffered(ZERO, offset)
        made.set_next_offset(ZERO, 0)
    assert made.stalled_s(ZERO) == 18
    made.set_next_offset(ZERO, 1)
    assert made.stalled_s(ZERO) == 0


def test_partition_is_not_stalled_behind_an_open_transaction_which_has_a_timer_of_its_own() -> None:
    made, clock = progress()
    made.set_next_offset(ZERO, 10)
    made.set_log(ZERO, LogRange(0, 10, 30))
    clock.now += 60
    made.set_log(ZERO, LogRange(0, 10, 50))
    assert (made.stalled_s(ZERO), made.transaction_s(ZERO)) == (0, 60)
    assert [(status.lag, status.transaction_s) for status in made.statuses()] == [(40, 60), (10, 0)]
    made.set_log(ZERO, LogRange(0, 30, 50))
    assert made.transaction_s(ZERO) == 0
    made.set_log(ZERO, LogRange(0, 50, 50))
    clock.now += 7
    assert (made.stalled_s(ZERO), made.transaction_s(ZERO)) == (7, 0)


def test_time_in_which_reading_waits_for_the_tables_is_left_out() -> None:
    made, clock = progress()
    for _ in range(10):
        clock.now += 3
        made.postpone_stalls(1)
    assert made.stalled_s(ZERO) == 20


def test_partition_that_is_read_to_its_end_is_not_stalled() -> None:
    made, clock = progress()
    made.set_next_offset(ZERO, 10)
    clock.now += 100
    assert made.stalled_s(ZERO) == 0
    made.set_log(ZERO, LogRange(0, 11, 11))
    clock.now += 2
    assert made.stalled_s(ZERO) == 2


def test_reset_restarts_the_stall_timers() -> None:
    made, clock = progress()
    clock.now += 100
    made.reset_stalls()
    clock.now += 1
    assert made.stalled_s(ZERO) == 1


def test_partition_is_not_stalled_right_after_a_seek() -> None:
    made, clock = progress()
    clock.now += 6
    assert made.stalled(5) == [ZERO, ONE]
    made.record_seek(ZERO)
    clock.now += 4
    assert made.stalled(5) == [ONE]
    clock.now += 2
    assert made.stalled(5) == [ZERO, ONE]


def test_partition_is_unverified_until_its_offset_lies_in_the_log() -> None:
    made, _ = progress()
    assert not made.unverified()
    made.set_log(ZERO, LogRange(3, 10, 10))
    assert made.unverified() == [ZERO]
    made.set_next_offset(ZERO, 3)
    made.set_log(ZERO, LogRange(3, 10, 10))
    assert not made.unverified()
    made.set_log(ONE, LogRange(0, 10, 10))
    made.assign([ONE])
    assert made.without_offset() == made.unverified() == [ONE]


def unread_times(tracker: ProgressTracker) -> list[float | None]:
    return [status.oldest_unread_time for status in tracker.statuses()]


def test_the_oldest_unread_record_is_the_one_at_the_next_offset() -> None:
    made, _ = progress()
    for offset in range(3):
        made.add_buffered(ZERO, offset, 1_000.0 + offset)
    assert unread_times(made) == [1_000.0, None]
    made.remove_buffered(ZERO, 0)
    made.set_next_offset(ZERO, 1)
    assert unread_times(made) == [1_001.0, None]
    made.remove_buffered(ZERO, 1)
    assert unread_times(made) == [None, None], "only a later record is in the buffer"
    made.set_next_offset(ZERO, 10)
    assert unread_times(made) == [None, None], "all is read"


def test_an_unread_record_outside_the_buffer_is_dated_by_a_second_consumer() -> None:
    made, _ = progress()
    assert made.undated() == [ZERO, ONE]
    made.set_found(ZERO, 0, 500.0)
    made.set_next_offset(ONE, 10)
    assert made.undated() == []
    assert unread_times(made) == [500.0, None]
    made.set_next_offset(ZERO, 1)
    assert made.undated() == [ZERO], "the time was that of another record"


def test_records_in_the_buffer_keep_their_times_in_a_new_assignment() -> None:
    made, _ = progress()
    made.add_buffered(ZERO, 0, 1_000.0)
    made.assign([ZERO])
    made.set_next_offset(ZERO, 0)
    made.set_log(ZERO, LogRange(0, 10, 10))
    assert unread_times(made) == [1_000.0]


def test_unassigned_partitions_are_ignored() -> None:
    made, _ = progress()
    made.assign([ONE])
    made.add_buffered(ZERO, 5, 1.0)
    made.remove_buffered(ZERO, 5)
    made.set_next_offset(ZERO, 5)
    made.set_log(ZERO, LogRange(0, 9, 9))
    assert made.sources() == [ONE]
    assert not made.statuses()


def test_shutdown_timer_ends_a_process_with_a_hanging_call_and_logs_its_stack() -> None:
    program = (
        "import threading, time\n"
        "from pipeline.health import ShutdownTimer\n"
        "def hanging(): time.sleep(600)\n"
        "threading.Thread(target=hanging).start()\n"
        "ShutdownTimer(timeout_s=0.1).start()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0
    assert "in hanging" in ended.stderr
    assert "shutdown_forced" in ended.stdout + ended.stderr
