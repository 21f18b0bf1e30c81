"""Keeping the tables fit: small files merged, old days let go, and what nobody needs any more deleted.

All of it runs beside the stream, on handles of its own. A commit of the stream that meets one of maintenance is tried
again on the state after it, as it is with the commits of other workers: nothing here touches the application
transactions of a partition. Two that maintain fence each other by a transaction of their own, and what was refused is
done in the next pass. So nobody has to be chosen; the worker that owns partition 0 of the traces does it, because two
would only do it in vain.

A reader that tails a table (``DeltaLog.read_added``) needs the very files that each commit added, also when they were
merged or let go since. Which files may be deleted:

1. Merging and letting go only mark files as removed. They are deleted ``tables.vacuum_retention`` later
   at the earliest,
   so that states of that age can be read.
2. What was added after the version that a reader announced stays, until the reader has not been heard of for
   ``tables.reader_lease``, or until the files are older than that.
3. What a named experiment holds (``pipeline.holds``) stays until it is released, and so does the log since then: states
   from its first version on, and what was added behind it, can be read.
4. Before files are deleted, the table is told from which version on every addition can still be read: a reader who
   stands before it gets an error that says so, never fewer rows.

Everything here goes by the clock, and a wrong one would delete what is needed. So a pass first asks the store what time
it is, by writing a file, and leaves the tables alone where its own clock says something else.

Tables without a column ``day`` are small and kept whole.
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

from pipeline.compaction import files_of, groups, merged
from pipeline.delta import LOG_DAYS, OLDEST, DeltaLog, TableError
from pipeline.holds import PREFIX, held
from schemas.batches import PARTITIONED_BY, TABLES
from schemas.settings import Tables

log = structlog.get_logger()

CLOCKS_DIFFER = timedelta(hours=1)
"""By how much, at most, the clocks of workers and of the store are taken to differ."""
FENCE = "maintenance"
"""Application transaction of every commit that removes files: the second of two that began on one state is refused."""
_LONG_AGO_HOURS = 24 * 366 * 20
"""For what is held and of which nobody knows when it was committed; the library counts in 64 bits of milliseconds."""
DELETE_EVERY_S = 3600.0
"""Every file of the tables is listed for it, and every commit of their logs."""


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What one pass did to a table, or would do."""

    table: str
    let_go: int = 0
    """Files of days that are over."""
    merged: int = 0
    """Small files that were merged."""
    into: int = 0
    """Files that they became."""
    deleted: int = 0
    """Files that nobody needed."""
    oldest: int = 0
    """Version after which every addition can be read."""
    held_by: str | None = None
    """Reader or experiment without which more could be deleted."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Cursor:
    """From where on a live reader, or an experiment, needs a table."""

    reader: str
    version: int
    hours: int
    """Since the first commit that it has not read."""


class Maintenance:
    """Passes over all tables below one address."""

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

    def run(self, *, delete: bool = True, dry_run: bool = False) -> list[Upkeep]:
        """One pass. What fails for a table is said in its result, and the pass goes on with the next.

        Args:
            delete: Also look for files to delete, for which all files are listed.
            dry_run: Change nothing, and say what a pass would do.
        """
        names = [name for name in TABLES if "day" in PARTITIONED_BY[name]]
        try:
            check_clock(self._log.store_clock())
        except TableError as error:
            return [Upkeep(name, error=str(error)) for name in names]
        return [self._of(name, delete, dry_run) for name in names]

    def _of(self, name: str, delete: bool, dry_run: bool) -> Upkeep:
        done: Counter[str] = Counter()
        oldest, held_by, error = 0, None, None
        try:
            with self._log.failures(name):
                done["let_go"] = self._let_days_go(name, dry_run)
                done["merged"], done["into"] = self._merge(name, dry_run)
                if delete:
                    done["deleted"], oldest, held_by = self._delete(name, dry_run)
        except TableError as failure:
            error = str(failure)
        return Upkeep(name, **done, oldest=oldest, held_by=held_by, error=error)

    def _let_days_go(self, name: str, dry_run: bool) -> int:
        """Remove the files of days that are over from the newest state, whole and without reading them."""
        first = (datetime.now(UTC) - timedelta(seconds=self._retention_s[name])).date()
        table = self._log.open(name)
        over = [file for file in files_of(table) if file.partition["day"] < f"{first}"]
        if over and not dry_run:
            _commit(name, table, [file.removed() for file in over])
        return len(over)

    def _merge(self, name: str, dry_run: bool) -> tuple[int, int]:
        """Merge small files within their partitions; how many, and into how many."""
        table = self._log.open(name)
        small = groups(files_of(table), self._settings.target_file_size_mb << 20)
        if small and not dry_run:
            store = self._log.store(name)
            _commit(name, table, [merged(group, store) for group in small] + [f.removed() for g in small for f in g])
        return sum(map(len, small)), len(small)

    def _delete(self, name: str, dry_run: bool) -> tuple[int, int, str | None]:
        """Delete files that are in no state that is kept, and that no reader needs; also old parts of the table's log.

        Returns:
            How many files, the version after which every addition can be read, and who held more back.
        """
        now = datetime.now(UTC)
        table = self._log.open(name)
        known = table.transaction_version(OLDEST) or 0
        hours = math.ceil(self._settings.vacuum_retention / 3600)
        oldest = self._log.version_at(name, now - timedelta(hours=hours) + CLOCKS_DIFFER)
        holds = self._holds(name, now)
        needed = [*self._readers(name, now), *holds]
        held = min((c for c in needed if c.version < oldest), key=lambda c: c.version, default=None)
        if held is not None:
            hours, oldest = max(hours, held.hours), held.version
        files = table.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=True)
        if oldest > known and (files or self._hours_since(name, known + 1, now) > LOG_DAYS * 24 - 24):
            known = oldest
            if not dry_run:
                _say_oldest(name, table, oldest)
        if not dry_run:
            if files:
                files = table.vacuum(hours, dry_run=False, enforce_retention_duration=False, full=True)
            if not holds:
                table.cleanup_metadata()
        return len(files), known, held.reader if held else None

    def _readers(self, name: str, now: datetime) -> list[Cursor]:
        """The live readers of a table."""
        lease = math.ceil(self._settings.reader_lease / 3600)
        rows = self._log.read("cursors").sort_by("time").to_pylist()
        alive = [row for row in rows if row["table"] == name and row["time"] > now - timedelta(hours=lease)]
        newest = {row["reader"]: row["version"] for row in alive}
        cursors = [Cursor(r, version, self._hours_since(name, version + 1, now)) for r, version in newest.items()]
        return [cursor for cursor in cursors if cursor.hours <= lease + 1]

    def _holds(self, name: str, now: datetime) -> list[Cursor]:
        """What experiments hold of a table, however old it is."""
        return [
            Cursor(
                f"{PREFIX}{hold.experiment}",
                hold.after_version,
                min(self._hours_since(name, hold.after_version + 1, now), _LONG_AGO_HOURS),
            )
            for hold in held(self._log)
            if hold.table == name
        ]

    def _hours_since(self, name: str, version: int, now: datetime) -> int:
        """Hours since a commit, rounded up, and one for the clocks; very many where the log has it no more."""
        at = self._log.committed(name, version)
        return sys.maxsize if at is None else math.ceil((now - at + CLOCKS_DIFFER) / timedelta(hours=1))


class Caretaker(threading.Thread):
    """Makes a pass every now and then, when it is this worker's turn; one that is cut short harms nothing."""

    def __init__(self, settings: Tables, my_turn: Callable[[], bool]) -> None:
        super().__init__(name="maintenance", daemon=True)
        self._maintenance = Maintenance(settings)
        self._every_s = settings.maintenance_interval
        self._my_turn = my_turn
        self.totals: Counter[str] = Counter()
        """Files by what became of them, and failures."""

    def run(self) -> None:
        """Until the process ends."""
        delete_at = time.monotonic()
        while True:
            time.sleep(self._every_s)
            if self._my_turn():
                delete = time.monotonic() >= delete_at
                try:
                    self.look_after(delete=delete)
                except Exception:
                    # Whatever it is: a thread that ends would do so in silence, and the tables fill up.
                    self.totals["failed"] += 1
                    log.exception("maintenance_broke_off")
                if delete:
                    delete_at = time.monotonic() + DELETE_EVERY_S

    def look_after(self, *, delete: bool) -> None:
        """One pass; what happened is logged and counted."""
        for done in self._maintenance.run(delete=delete):
            counts = {"let_go": done.let_go, "merged": done.merged, "into": done.into, "deleted": done.deleted}
            self.totals.update(counts)
            if done.error:
                self.totals["failed"] += 1
                log.warning("maintenance_failed", table=done.table, why=done.error)
            elif any(counts.values()):
                log.info("maintained", table=done.table, oldest=done.oldest, held_by=done.held_by, **counts)


def check_clock(store: datetime) -> None:
    """Compare the clock of this machine with that of the store.

    Raises:
        TableError: they differ by more than clocks do.
    """
    now = datetime.now(UTC)
    if abs(now - store) > CLOCKS_DIFFER:
        raise TableError(
            f"the clock of this machine says {now:%F %T}, that of the store under tables.uri {store:%F %T}: nothing is "
            f"let go, merged or deleted until they agree"
        )


def _commit(name: str, table: DeltaTable, actions: list[AddAction | RemoveAction]) -> None:
    """Take files out of a table, or others in their place, unless another one has done so since its state was read."""
    table.create_write_transaction(
        actions,
        mode="append",
        schema=table.schema(),
        partition_by=list(PARTITIONED_BY[name]),
        commit_properties=CommitProperties(app_transactions=[Transaction(FENCE, table.version())]),
    )


def _say_oldest(name: str, table: DeltaTable, oldest: int) -> None:
    """Move the mark that readers look at, in a commit that adds nothing."""
    mark = CommitProperties(app_transactions=[Transaction(OLDEST, oldest)])
    write_deltalake(table, TABLES[name].empty_table(), mode="append", commit_properties=mark)
