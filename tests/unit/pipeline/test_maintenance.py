"""Tests of maintenance: compaction, retention and vacuum, hours and days later.

A later run is a process whose clock is ahead and that skips the clock check. The times of files are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import libfaketime
import pyarrow as pa
import pytest
from recorded import conversation, record_of, tables_of
from typer.testing import CliRunner

from ops.cli.main import app
from pipeline import delta, holds, maintenance
from pipeline.compaction import list_data_files
from pipeline.delta import DeltaLog, HistoryExpiredError
from pipeline.maintenance import Maintenance, MaintenanceResult, MaintenanceThread
from pipeline.offsets import COMMIT_ORDER, Batch, OffsetCommitter, SourcePartition
from schemas.batches import TABLES, day_of
from schemas.errors import UserError
from schemas.settings import Settings, Tables, to_environ

CLOCK = Path(libfaketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
SOURCE = SourcePartition("traces", 0)
AURORA = "from ops.cli.main import app; app()"
SKIP_CLOCK_CHECK = "import pipeline.maintenance as m; m.check_clock = lambda _: None; "


@dataclass
class World:
    """Tables that are written by the stream's protocol, and maintained."""

    settings: Tables
    log: DeltaLog = field(init=False)
    offset: int = 0

    def __post_init__(self) -> None:
        self.log = DeltaLog(self.settings)
        self.log.create()
        self.committer = OffsetCommitter(self.log)

    def commit(self, commits: int, *, age: timedelta = timedelta(0)) -> None:
        """Make commits of one record each."""
        at = round((datetime.now(UTC) - age).timestamp() * 1e6)
        for _ in range(commits):
            record = record_of(f"request-{self.offset}", conversation(range(9), 4), self.offset)
            rows = tables_of(record)
            for name in COMMIT_ORDER:
                column = TABLES[name].get_field_index("day")
                days = pa.array([day_of(at)] * rows[name].num_rows, pa.date32())
                rows[name] = rows[name].set_column(column, TABLES[name].field(column), days)
            self.committer.commit([Batch(SOURCE, self.offset, rows)])
            self.offset += 1

    def maintain(self, *, dry_run: bool = False) -> dict[str, MaintenanceResult]:
        """Run maintenance and return the result of each table."""
        done = {of_one.table: of_one for of_one in Maintenance(self.settings).run(dry_run=dry_run)}
        assert not any(of_one.error for of_one in done.values())
        return done

    def maintain_later(self, hours: int) -> dict[str, MaintenanceResult]:
        """Run maintenance by the CLI, ``hours`` from now."""
        environ = {**os.environ, **to_environ(Settings(tables=self.settings)), "OMP_NUM_THREADS": "1"}
        environ |= {"LD_PRELOAD": str(CLOCK), "FAKETIME": f"+{hours}h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        command = [sys.executable, "-c", SKIP_CLOCK_CHECK + AURORA, "tables", "maintain", "--json"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return {of_one["table"]: MaintenanceResult(**of_one) for of_one in json.loads(done.stdout)["tables"]}

    def files(self, name: str = "accepted") -> int:
        return len(list((Path(self.settings.uri) / name).rglob("*.parquet")))

    def added(self, after: int, name: str = "accepted") -> list[int]:
        rows = self.log.read_added(name, after, self.log.version(name), ["offset"])
        return [int(offset) for offset in rows["offset"].to_pylist()]

    def offsets(self, name: str = "accepted") -> list[int]:
        return sorted(set(self.log.read(name, ["offset"])["offset"].to_pylist()))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Tables(uri=str(tmp_path), vacuum_retention="24h", reader_lease="72h"))


def test_compaction_keeps_every_row_for_every_reader(world: World) -> None:
    world.commit(6)
    before = world.log.read("traces").sort_by([("offset", "ascending"), ("verify_step", "ascending")])
    done = Maintenance(world.settings).run()
    assert {of_one.table: (of_one.compacted, of_one.written) for of_one in done if of_one.compacted} == {
        "rejected": (6, 1), "traces": (6, 1), "accepted": (6, 1),
    }  # fmt: skip
    assert world.log.read("traces").sort_by([("offset", "ascending"), ("verify_step", "ascending")]).equals(before)
    assert world.added(0) == [0, 1, 2, 3, 4, 5]
    assert sorted(world.log.read("accepted", ["offset"], at=3)["offset"].to_pylist()) == [0, 1, 2]
    some = world.log.read_offsets("accepted", SOURCE, range(2, 4), ["offset"])
    assert some["offset"].to_pylist() == [2, 3]
    (file,) = list_data_files(world.log.open("accepted"))
    bounds = (file.min_values["offset"], file.max_values["offset"])
    assert (file.rows, bounds) == (6, (0, 5)), "queries know which files they can skip"
    again = Maintenance(world.settings).run()
    assert again == [MaintenanceResult(of_one.table) for of_one in done], "a second run has nothing to do"


def test_checkpoints_are_written_by_maintenance_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "CHECKPOINT_COMMITS", 4)
    monkeypatch.setitem(delta.TABLE_PROPERTIES, "delta.checkpointInterval", "2")
    names = ("accepted", "traces", "dead_letters")
    world = World(Tables(uri=str(tmp_path)))
    world.commit(2)
    upkeep = Maintenance(world.settings)
    assert upkeep.write_checkpoints() == 0
    assert [world.log.checkpoint_version(name) for name in names] == [-1, -1, -1]
    world.commit(2)
    assert upkeep.write_checkpoints() == 0
    assert [world.log.checkpoint_version(name) for name in names] == [4, 4, -1]
    world.commit(2)
    assert upkeep.write_checkpoints() == 0
    assert world.log.checkpoint_version("accepted") == 4
    assert world.offsets() == list(range(6))
    assert OffsetCommitter(DeltaLog(world.settings)).next_offset(SOURCE) == 6


def test_failed_checkpoint_is_counted_and_the_other_tables_get_theirs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "CHECKPOINT_COMMITS", 1)
    world.commit(1)
    (Path(world.settings.uri) / "rejected" / "_delta_log" / f"{1:020}.json").write_text("{")
    assert Maintenance(world.settings).write_checkpoints() == 1
    assert world.log.checkpoint_version("accepted") == 1


def test_live_reader_reads_added_rows_after_compaction_and_vacuum(world: World) -> None:
    world.commit(6)
    world.log.save_cursor("far", {"accepted": 4})
    world.log.save_cursor("near", {"accepted": world.log.version("accepted")})
    world.maintain()
    world.log.save_cursor("far", {"accepted": 2})
    expected = world.log.read_added("accepted", 2, world.log.version("accepted"))
    assert world.maintain_later(30)["accepted"].held_by == "far"
    assert world.log.read_added("accepted", 2, world.log.version("accepted")).equals(expected)
    assert world.added(2) == [2, 3, 4, 5]
    assert world.offsets() == [0, 1, 2, 3, 4, 5]


def test_reader_after_its_lease_gets_an_error_and_can_continue(world: World) -> None:
    world.commit(6)
    world.log.save_cursor("gone", {"accepted": 2})
    world.maintain()
    done = world.maintain_later(80)["accepted"]
    assert (done.vacuumed, done.held_by) == (6, None)
    assert world.files() == 1
    with pytest.raises(HistoryExpiredError, match=r"after version 2 .* from version 7 on.* tables\.reader_lease"):
        world.log.read_added("accepted", 2, 6)
    assert world.log.oldest_readable("accepted") == 7
    assert world.offsets() == [0, 1, 2, 3, 4, 5]
    world.commit(2)
    assert world.added(world.log.oldest_readable("accepted")) == [6, 7]


def test_stuck_reader_keeps_files_no_longer_than_its_lease(world: World) -> None:
    world.commit(3)
    world.maintain()
    late = (datetime.now(UTC) + timedelta(hours=79)).timestamp()
    row = {
        "time": round(late * 1e6),
        "day": round(late) // 86_400,
        "reader": "stuck",
        "table": "accepted",
        "version": 0,
    }
    world.log.append("cursors", pa.Table.from_pylist([row], schema=TABLES["cursors"]))
    done = world.maintain_later(80)["accepted"]
    assert (done.vacuumed, done.held_by) == (3, None)


def test_versions_are_readable_for_the_vacuum_retention_and_no_longer(world: World) -> None:
    world.commit(4)
    world.maintain()
    assert world.maintain_later(23)["accepted"].vacuumed == 0
    assert sorted(world.log.read("accepted", ["offset"], at=2)["offset"].to_pylist()) == [0, 1]
    assert world.maintain_later(25)["accepted"].vacuumed == 4
    assert world.offsets() == [0, 1, 2, 3]


def test_days_past_their_retention_expire_as_a_whole(world: World) -> None:
    world.commit(2, age=timedelta(days=20))
    world.commit(2, age=timedelta(days=12))
    world.commit(2)
    would = world.maintain(dry_run=True)
    assert (would["accepted"].expired, would["traces"].expired) == (2, 0)
    assert world.offsets() == [0, 1, 2, 3, 4, 5]
    done = world.maintain()
    assert (done["accepted"].expired, done["rejected"].expired, done["traces"].expired) == (2, 2, 0)
    assert world.offsets() == [2, 3, 4, 5]
    assert world.offsets("traces") == [0, 1, 2, 3, 4, 5]
    assert world.added(0) == [0, 1, 2, 3, 4, 5], "a tailing reader reads added rows until they are deleted"
    world.maintain_later(25)
    assert world.offsets() == [2, 3, 4, 5]
    assert not list(Path(world.settings.uri).glob(f"accepted/line=*/day={datetime.now(UTC) - timedelta(days=20):%F}/*"))


def aged(table: Path, days: int) -> None:
    """Set the age of the commits of a table, by the clock of its store."""
    then = (datetime.now(UTC) - timedelta(days=days)).timestamp()
    for commit in (table / "_delta_log").iterdir():
        os.utime(commit, (then, then))


def test_old_commits_are_removed_from_the_log_and_reading_them_is_an_error(world: World, tmp_path: Path) -> None:
    world.commit(5)
    world.log.open("accepted").create_checkpoint()
    aged(tmp_path / "accepted", 20)
    world.log.save_cursor("expired", {"accepted": 3})
    world.commit(2)
    world.maintain()
    assert not (tmp_path / "accepted/_delta_log/00000000000000000004.json").exists()
    assert world.log.oldest_readable("accepted") == 5
    with pytest.raises(HistoryExpiredError):
        world.added(3)
    assert world.added(5) == [5, 6]
    assert world.offsets() == list(range(7))
    world.commit(1)
    assert world.offsets() == list(range(8)), "the stream can still commit"


def test_log_that_a_live_reader_needs_is_kept(world: World, tmp_path: Path) -> None:
    world.commit(5)
    world.log.open("accepted").create_checkpoint()
    aged(tmp_path / "accepted", 2)
    world.log.save_cursor("slow", {"accepted": 3})
    world.commit(2)
    world.maintain()
    assert world.log.oldest_readable("accepted") == 0
    assert world.added(3) == [3, 4, 5, 6]


def test_maintenance_does_nothing_if_its_clock_differs_from_the_store(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.commit(3)
    versions = {name: world.log.version(name) for name in TABLES}
    for hours in (-30, 400):
        store = datetime.now(UTC) + timedelta(hours=hours)
        monkeypatch.setattr(DeltaLog, "store_clock", lambda _, at=store: at)
        done = Maintenance(world.settings).run()
        assert all("the clock of this machine" in (of_one.error or "") for of_one in done)
    assert {name: world.log.version(name) for name in TABLES} == versions
    monkeypatch.undo()
    assert abs(world.log.store_clock() - datetime.now(UTC)) < timedelta(minutes=5)
    assert world.maintain()["accepted"].compacted == 3


def test_dry_run_returns_the_result_and_changes_nothing(world: World) -> None:
    world.commit(3)
    versions = {name: world.log.version(name) for name in TABLES}
    would = world.maintain(dry_run=True)
    assert (would["accepted"].compacted, would["accepted"].written) == (3, 1)
    assert {name: world.log.version(name) for name in TABLES} == versions
    assert world.files() == 3


def test_maintenance_and_stream_commits_do_not_block_each_other(world: World) -> None:
    """Two maintenance threads run beside a stream that commits: no row is lost or duplicated, no commit is fenced."""
    stopping = threading.Event()
    results: list[MaintenanceResult] = []

    def maintain_forever() -> None:
        maintenance = Maintenance(world.settings)
        while not stopping.is_set():
            results.extend(maintenance.run())

    threads = [threading.Thread(target=maintain_forever) for _ in range(2)]
    for thread in threads:
        thread.start()
    world.commit(25)
    stopping.set()
    for thread in threads:
        thread.join()
    assert sum(of_one.compacted for of_one in results) > 0
    for name in ("rejected", "traces", "accepted"):
        assert world.offsets(name) == list(range(25))
        assert world.log.read(name).num_rows == world.log.read_added(name, 0, world.log.version(name)).num_rows
    assert Maintenance(world.settings).run()[0].error is None


def test_failure_of_one_table_does_not_affect_the_others(world: World, tmp_path: Path) -> None:
    world.commit(3)
    (tmp_path / "rejected").rename(tmp_path / "away")
    (tmp_path / "rejected").write_text("a file where the table was")
    done = {of_one.table: of_one for of_one in Maintenance(world.settings).run()}
    assert "tables.uri" in (done["rejected"].error or "")
    assert done["accepted"].compacted == 3


def test_the_thread_dates_the_last_run_without_a_failed_table(world: World, tmp_path: Path) -> None:
    thread = MaintenanceThread(world.settings, lambda: True)
    thread._run_once(vacuum=False)
    succeeded = thread.last_success
    assert succeeded is not None
    (tmp_path / "rejected").rename(tmp_path / "away")
    (tmp_path / "rejected").write_text("a file where the table was")
    thread._run_once(vacuum=False)
    assert (thread.last_success, thread.files["failed"]) == (succeeded, 1)


def test_retention_hold_outlives_leases_and_retention_until_it_is_released(world: World) -> None:
    world.commit(3, age=timedelta(days=13, hours=20))
    world.commit(3)
    holds.add_hold(world.log, "ablation", {"accepted": (1, 5)})
    expected, state = world.log.read_added("accepted", 1, 5), world.log.read("accepted", ["offset"], at=2)
    world.maintain()
    assert world.maintain_later(24 * 20)["accepted"].held_by == "hold/ablation"
    assert world.log.read_added("accepted", 1, 5).equals(expected)
    assert world.log.read("accepted", ["offset"], at=2).equals(state)
    assert world.offsets() == [], "all days have expired in the newest version"
    (one,) = holds.list_holds(world.log)
    sizes = holds.measure_hold(world.log, one)
    assert 0 < sizes.total == sizes.held

    assert [h.table for h in holds.release_holds(world.log, "ablation")] == ["accepted"]
    done = world.maintain_later(24 * 22)["accepted"]
    assert (done.held_by, world.files()) == (None, 0)
    with pytest.raises(HistoryExpiredError):
        world.log.read_added("accepted", 1, 5)
    with pytest.raises(HistoryExpiredError):
        holds.add_hold(world.log, "late", {"accepted": (1, 5)})
    assert holds.list_holds(world.log) == [], "deleted rows are not held"


def test_experiment_has_one_hold_which_the_cli_lists_and_releases(world: World) -> None:
    world.commit(3)
    for _ in range(2):
        holds.add_hold(world.log, "one", {"accepted": (0, 3), "rejected": (0, 3)})
    with pytest.raises(UserError, match=r"one holds accepted 0 to 3, rejected 0 to 3: use another --name"):
        holds.add_hold(world.log, "one", {"accepted": (1, 3)})
    environ = to_environ(Settings(tables=world.settings))
    listed = json.loads(CliRunner().invoke(app, ["replay", "list", "--json"], env=environ).stdout)
    assert [(one["experiment"], one["table"], one["bytes"]["held"]) for one in listed] == [
        ("one", "accepted", 0), ("one", "rejected", 0),
    ]  # fmt: skip
    for arguments, left in ((["one", "--dry-run"], 2), (["one"], 0)):
        result = CliRunner().invoke(app, ["replay", "release", *arguments], env=environ)
        assert "accepted: versions 0 to 3" in result.stdout
        assert len(holds.list_holds(world.log)) == left
    result = CliRunner().invoke(app, ["replay", "release", "one"], env=environ)
    assert (result.exit_code, "experiment one holds nothing" in result.output) == (2, True)
