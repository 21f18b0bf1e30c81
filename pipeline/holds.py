"""Retention holds: table versions that an experiment needs. Maintenance keeps them until they are released.

A reader's lease (``DeltaLog.save_cursor``) expires; a hold does not. A hold names a table and two of its versions. Rows
that the commits between them added can be read version by version, and every version from the first one on can be read
as a whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.delta import DeltaLog
from schemas.batches import HOLDS
from schemas.errors import UserError

HOLD_PREFIX = "hold/"
"""Prefix of an experiment's name where readers are listed too."""
_TABLE = "holds"


@dataclass(frozen=True, slots=True)
class RetentionHold:
    """Versions of a table that an experiment needs."""

    experiment: str
    table: str
    after_version: int
    up_to_version: int
    time_us: int
    """Unix time in microseconds at which the hold was added."""


@dataclass(frozen=True, slots=True)
class HoldSize:
    """Bytes of the files that the commits of a hold added."""

    total: int
    held: int
    """Bytes of held files that the newest version lacks; only the hold keeps them."""


def list_holds(log: DeltaLog) -> list[RetentionHold]:
    """Return all holds that are not released, in the order in which they were added.

    Raises:
        TableError: the table cannot be read.
    """
    newest = {(row["experiment"], row["table"]): row for row in log.read_in_order(_TABLE).to_pylist()}
    return [
        RetentionHold(
            row["experiment"],
            row["table"],
            row["after_version"],
            row["up_to_version"],
            round(row["time"].timestamp() * 1e6),
        )
        for row in newest.values()
        if not row["released"]
    ]


def add_hold(log: DeltaLog, experiment: str, versions: Mapping[str, tuple[int, int]]) -> None:
    """Hold versions of some tables for an experiment. Adding the same hold again changes nothing.

    Args:
        log: The tables.
        experiment: Name of the experiment.
        versions: By table, the version after which the experiment reads and the last version that it reads.

    Raises:
        UserError: the experiment holds other versions.
        HistoryExpiredError: the rows added after a version are deleted already; nothing is held then.
    """
    known = {h.table: (h.after_version, h.up_to_version) for h in list_holds(log) if h.experiment == experiment}
    if known == dict(versions):
        return
    if known:
        held = ", ".join(f"{table} {first} to {last}" for table, (first, last) in known.items())
        raise UserError(f"experiment {experiment} holds {held}: use another --name, or release it first")
    _write(log, experiment, versions, released=False)
    try:
        # Checked after the row is written, so that files that exist now are kept.
        for table, (first, _) in versions.items():
            log.check_readable(table, first)
    except BaseException:
        _write(log, experiment, versions, released=True)
        raise


def release_holds(log: DeltaLog, experiment: str) -> list[RetentionHold]:
    """Release the holds of an experiment and return them.

    Raises:
        UserError: the experiment holds nothing.
    """
    holds = list_holds(log)
    released = [hold for hold in holds if hold.experiment == experiment]
    if not released:
        names = ", ".join(sorted({hold.experiment for hold in holds})) or "none"
        raise UserError(f"experiment {experiment} holds nothing; experiments with holds: {names}")
    _write(log, experiment, {h.table: (h.after_version, h.up_to_version) for h in released}, released=True)
    return released


def measure_hold(log: DeltaLog, hold: RetentionHold) -> HoldSize:
    """Return the bytes that a hold keeps, from the table's log alone.

    Raises:
        TableError: the log cannot be read.
    """
    newest = log.file_sizes(hold.table)
    sizes = dict(_list_added_files(log, hold))
    return HoldSize(sum(sizes.values()), sum(size for path, size in sizes.items() if path not in newest))


def _list_added_files(log: DeltaLog, hold: RetentionHold) -> Iterator[tuple[str, int]]:
    """Yield path and bytes of every file with added rows."""
    store = log.filesystem(hold.table)
    with log.translate_errors(hold.table):
        for version in range(hold.after_version + 1, hold.up_to_version + 1):
            with store.open_input_stream(f"_delta_log/{version:020}.json") as file:
                actions: list[dict[str, Any]] = [json.loads(line) for line in file.read().splitlines()]
            for action in actions:
                if (add := action.get("add")) and add["dataChange"]:
                    yield add["path"], add["size"]


def _write(log: DeltaLog, experiment: str, versions: Mapping[str, tuple[int, int]], *, released: bool) -> None:
    now = time.time_ns() // 1000
    rows = [
        {
            "time": now,
            "experiment": experiment,
            "table": table,
            "after_version": first,
            "up_to_version": last,
            "released": released,
        }
        for table, (first, last) in versions.items()
    ]
    log.append(_TABLE, pa.Table.from_pylist(rows, schema=HOLDS))
