"""Table maintenance: checkpoints, compaction of small files, retention of old days, and vacuum of unneeded files.

Maintenance runs beside the stream, on table handles of its own. It never changes the application transactions of a
source partition, so it fences no worker: the stream's commits are put behind those of maintenance. Two maintenance runs
at the same time fence each other by a transaction of their own, and the next run does the rejected work. So no leader
election is needed. The worker that owns partition 0 of the traces topic runs maintenance, only because a second run
would repeat the work.

A reader that tails a table (``DeltaLog.read_added``) needs the files that each commit added, even if they were
compacted or expired since. These rules decide which files vacuum may delete:

1. Compaction and retention only mark files as removed. Vacuum deletes them ``tables.vacuum_retention`` later at the
   earliest, so versions of that age can be read.
2. Files added after the version in a reader's cursor stay until the cursor is ``tables.reader_lease`` old, or the files
   are older than that.
3. Files that a retention hold covers (``pipeline.holds``) stay until the hold is released, and so does the log since
   then: rows added after the first version of the hold can be read, and every version from it on.
4. Before files are deleted, the table records the version from which all added rows can still be read. A reader before
   it gets an error that says so, never fewer rows.

All rules depend on the clock, and a wrong clock would delete files that are needed. A run first compares its clock
with the store's, by writing a file, and does nothing if they differ.

Tables without a column ``day`` are small and are kept whole.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.transaction import AddAction, RemoveAction

from pipeline.compaction import group_small_files, list_data_files, write_merged_file
from pipeline.delta import CHECKPOINT_COMMITS, LOG_DAYS, OLDEST, SCHEMA_MODE, DeltaLog, TableError
from pipeline.holds import HOLD_PREFIX, list_holds
from schemas.batches import PARTITIONED_BY, TABLES
from schemas.settings import Tables

log = structlog.get_logger()

MAX_CLOCK_SKEW = timedelta(hours=1)
"""Largest difference between the clocks of workers and of the store."""
FENCE = "maintenance"
"""Application transaction of every commit that removes files. Of two that began on one version the second is
rejected."""
_COUNTED = ("expired", "compacted", "written", "vacuumed")
MAINTENANCE_ACTIONS = (*_COUNTED, "failed")
"""What is counted of maintenance: files by action, and failed runs over a table."""
_MAX_HOLD_HOURS = 24 * 366 * 20
"""Age of a hold whose commit is no longer in the log. The library counts in 64 bits of milliseconds."""
CHECKPOINT_INTERVAL_S = 60.0
"""The logs are checked this often for ``CHECKPOINT_COMMITS`` commits without a checkpoint."""
VACUUM_INTERVAL_S = 3600.0
"""Vacuum lists every file of the tables and every commit of their logs."""


@dataclass(frozen=True, slots=True)
class MaintenanceResult:
    """Result of one run over a table, or of its dry run."""

    table: str
    expired: int = 0
    """Files of days past their retention."""
    compacted: int = 0
    """Small files that were merged."""
    written: int = 0
    """Files that the small ones were merged into."""
    vacuumed: int = 0
    """Files that were deleted from the store."""
    oldest_readable: int = 0
    """Version after which all added rows can be read."""
    held_by: str | None = None
    """Reader or experiment that keeps more files from being deleted."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ReaderCursor:
    """Version after which a live reader, or an experiment, needs a table."""

    reader: str
    version: int
    hours: int
    """Hours since the first commit that it has not read."""


class Maintenance:
    """Maintains all tables below one address."""

    def __init__(self, settings: Tables) -> None:
        self._settings = settings
        self._log = DeltaLog(settings)
        self._retention_s = {
            "accepted": settings.batches_retention,
            "rejected": settings.batches_retention,
            "traces": settings.traces_retention,
            "dead_letters": settings.dead_letters_retention,
            "cursors": settings.reader_lease + 86_400,
        }

    def run(self, *, vacuum: bool = True, dry_run: bool = False) -> list[MaintenanceResult]:
        """Maintain all tables once. An error of one table is in its result, and the run continues.

        Args:
            vacuum: Also delete files, for which all files are listed.
            dry_run: Change nothing, and return the result that a run would have.
        """
        names = [name for name in TABLES if "day" in PARTITIONED_BY[name]]
        try:
            check_clock(self._log.store_clock())
        except TableError as error:
            return [MaintenanceResult(name, error=str(error)) for name in names]
        done = [self._maintain(name, vacuum, dry_run) for name in names]
        if not dry_run:
            self.write_checkpoints()
        return done

    def write_checkpoints(self) -> int:
        """Write a checkpoint of every table with ``CHECKPOINT_COMMITS`` commits since the last one.

        Returns:
            The number of tables whose checkpoint failed. The next run writes it.
        """
        failed = 0
        for name in TABLES:
            try:
                with self._log.translate_errors(name):
                    table = self._log.snapshot(name).table
                    if table.version() - self._log.checkpoint_version(name) >= CHECKPOINT_COMMITS:
                        table.create_checkpoint()
            except TableError as error:
                failed += 1
                log.warning("checkpoint_failed", table=name, why=str(error))
        return failed

    def _maintain(self, name: str, vacuum: bool, dry_run: bool) -> MaintenanceResult:
        done: Counter[str] = Counter()
        oldest, held_by, error = 0, None, None
        try:
            with self._log.translate_errors(name):
                done["expired"] = self._expire_days(name, dry_run)
                done["compacted"], done["written"] = self._compact(name, dry_run)
                if vacuum:
                    done["vacuumed"], oldest, held_by = self._vacuum(name, dry_run)
        except TableError as failure:
            error = str(failure)
        return MaintenanceResult(name, **done, oldest_readable=oldest, held_by=held_by, error=error)

    def _expire_days(self, name: str, dry_run: bool) -> int:
        """Remove files of days past their retention from the newest version, without reading them."""
        first = (datetime.now(UTC) - timedelta(seconds=self._retention_s[name])).date()
        table = self._log.open(name)
        expired = [file for file in list_data_files(table) if file.partition["day"] < f"{first}"]
        if expired and not dry_run:
            _commit(name, table, [file.remove_action() for file in expired])
        return len(expired)

    def _compact(self, name: str, dry_run: bool) -> tuple[int, int]:
        """Merge small files within their partitions. Return the number of files before and after."""
        table = self._log.open(name)
        groups = group_small_files(list_data_files(table), self._settings.target_file_size_mb << 20)
        if groups and not dry_run:
            store = self._log.filesystem(name)
            added = [write_merged_file(group, store) for group in groups]
            _commit(name, table, [*added, *(file.remove_action() for group in groups for file in group)])
        return sum(map(len, groups)), len(groups)

    def _vacuum(self, name: str, dry_run: bool) -> tuple[int, int, str | None]:
        """Delete files that are in no retained version and that no reader needs, and old parts of the table's log.

        Returns:
            The number of files, the version after which all added rows can be read, and the reader that keeps more.
        """
        now = datetime.now(UTC)
        table = self._log.open(name)
        recorded = table.transaction_version(OLDEST) or 0
        hours = math.ceil(self._settings.vacuum_retention / 3600)
        oldest = self._log.version_at(name, now - timedelta(hours=hours) + MAX_CLOCK_SKEW)
        holds = self._list_holds(name, now)
        cursors = [*self._list_readers(name, now), *holds]
        slowest = min((c for c in cursors if c.version < oldest), key=lambda c: c.version, default=None)
        if slowest is not None:
            hours, oldest = max(hours, slowest.hours), slowest.version
        files = table.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=True)
        if oldest > recorded and (files or self._hours_since(name, recorded + 1, now) > LOG_DAYS * 24 - 24):
            recorded = oldest
            if not dry_run:
                _record_oldest(name, table, oldest)
        if not dry_run:
            if files:
                files = table.vacuum(hours, dry_run=False, enforce_retention_duration=False, full=True)
            if not holds:
                table.cleanup_metadata()
        return len(files), recorded, slowest.reader if slowest else None

    def _list_readers(self, name: str, now: datetime) -> list[ReaderCursor]:
        """Return the cursors of the live readers of a table."""
        lease = math.ceil(self._settings.reader_lease / 3600)
        rows = self._log.read("cursors").sort_by("time").to_pylist()
        alive = [row for row in rows if row["table"] == name and row["time"] > now - timedelta(hours=lease)]
        newest = {row["reader"]: row["version"] for row in alive}
        cursors = [
            ReaderCursor(reader, version, self._hours_since(name, version + 1, now))
            for reader, version in newest.items()
        ]
        return [cursor for cursor in cursors if cursor.hours <= lease + 1]

    def _list_holds(self, name: str, now: datetime) -> list[ReaderCursor]:
        """Return the retention holds of a table, of any age, as cursors."""
        return [
            ReaderCursor(
                f"{HOLD_PREFIX}{hold.experiment}",
                hold.after_version,
                min(self._hours_since(name, hold.after_version + 1, now), _MAX_HOLD_HOURS),
            )
            for hold in list_holds(self._log)
            if hold.table == name
        ]

    def _hours_since(self, name: str, version: int, now: datetime) -> int:
        """Return the hours since a commit, rounded up, plus the clock skew; the maximum if the log lacks the commit."""
        at = self._log.commit_time(name, version)
        return sys.maxsize if at is None else math.ceil((now - at + MAX_CLOCK_SKEW) / timedelta(hours=1))


class MaintenanceThread(threading.Thread):
    """Runs maintenance at an interval while ``is_leader`` returns True. An interrupted run does no harm."""

    def __init__(self, settings: Tables, is_leader: Callable[[], bool]) -> None:
        super().__init__(name="maintenance", daemon=True)
        self._maintenance = Maintenance(settings)
        self._interval_s = settings.maintenance_interval
        self._is_leader = is_leader
        self.files: Counter[str] = Counter()
        """Files by action: one of ``MAINTENANCE_ACTIONS``."""
        self.last_success: float | None = None
        """Unix time of the last run in which no table failed, or of the moment at which this worker was found to be the
        one that runs maintenance; None on another worker."""

    def run(self) -> None:
        """Run maintenance until the process ends."""
        next_vacuum = time.monotonic()
        next_run = next_vacuum + self._interval_s
        while True:
            time.sleep(min(self._interval_s, CHECKPOINT_INTERVAL_S))
            if not self._is_leader():
                self.last_success = None
                continue
            self.last_success = self.last_success or time.time()
            now = time.monotonic()
            runs, vacuum = now >= next_run, now >= next_vacuum
            try:
                if runs:
                    self._run_once(vacuum=vacuum)
                else:
                    self.files["failed"] += self._maintenance.write_checkpoints()
            except Exception:
                # Any error: a thread that ends would do so silently, and the tables would fill up.
                self.files["failed"] += 1
                log.exception("maintenance_failed")
            if runs:
                next_run = time.monotonic() + self._interval_s
                next_vacuum = time.monotonic() + VACUUM_INTERVAL_S if vacuum else next_vacuum

    def _run_once(self, *, vacuum: bool) -> None:
        results = self._maintenance.run(vacuum=vacuum)
        if not any(done.error for done in results):
            self.last_success = time.time()
        for done in results:
            counts = {name: getattr(done, name) for name in _COUNTED}
            self.files.update(counts)
            if done.error:
                self.files["failed"] += 1
                log.warning("table_maintenance_failed", table=done.table, why=done.error)
            elif any(counts.values()):
                log.info(
                    "table_maintained",
                    table=done.table,
                    oldest_readable=done.oldest_readable,
                    held_by=done.held_by,
                    **counts,
                )


def check_clock(store: datetime) -> None:
    """Compare the clock of this machine with the store's.

    Raises:
        TableError: they differ by more than ``MAX_CLOCK_SKEW``.
    """
    now = datetime.now(UTC)
    if abs(now - store) > MAX_CLOCK_SKEW:
        raise TableError(
            f"the clock of this machine is {now:%F %T}, the clock of the store at tables.uri is {store:%F %T}: no file "
            f"expires or is compacted or deleted until they agree"
        )


def _commit(name: str, table: DeltaTable, actions: list[AddAction | RemoveAction]) -> None:
    """Remove or replace files. Fails if another run has done so since the table was read."""
    table.create_write_transaction(
        actions,
        mode="append",
        schema=table.schema(),
        partition_by=list(PARTITIONED_BY[name]),
        commit_properties=CommitProperties(app_transactions=[Transaction(FENCE, table.version())]),
    )


def _record_oldest(name: str, table: DeltaTable, oldest: int) -> None:
    """Record the version after which all added rows can be read, in a commit that adds nothing."""
    commit = CommitProperties(app_transactions=[Transaction(OLDEST, oldest)])
    write_deltalake(table, TABLES[name].empty_table(), mode="append", schema_mode=SCHEMA_MODE, commit_properties=commit)
