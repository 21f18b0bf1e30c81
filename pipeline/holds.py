"""Past versions that experiments are named on: they outlive retention and maintenance until they are released.

A reader's lease (``DeltaLog.announce``) ends by itself; a hold does not. It names a table and two of its versions: what
the commits between them added can be read version by version, and every state from the first one on as a whole.
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

PREFIX = "hold/"
"""Before an experiment's name where readers are named too."""
_TABLE = "holds"


@dataclass(frozen=True, slots=True)
class Hold:
    """Versions of a table that an experiment needs."""

    experiment: str
    table: str
    after_version: int
    up_to_version: int
    time_us: int
    """Since when, as Unix microseconds."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of the files that the commits of a hold added."""

    all: int
    gone: int
    """Those of them that the newest state has no more: they are there for the sake of the hold."""


def held(log: DeltaLog) -> list[Hold]:
    """Everything that is held, in the order in which it was named.

    Raises:
        TableError: the table cannot be read.
    """
    newest = {(row["experiment"], row["table"]): row for row in log.read_in_order(_TABLE).to_pylist()}
    return [
        Hold(
            row["experiment"],
            row["table"],
            row["after_version"],
            row["up_to_version"],
            round(row["time"].timestamp() * 1e6),
        )
        for row in newest.values()
        if not row["released"]
    ]


def hold(log: DeltaLog, experiment: str, versions: Mapping[str, tuple[int, int]]) -> None:
    """Hold versions of some tables in the name of an experiment; once more changes nothing.

    Args:
        log: Where the tables are.
        experiment: Its name.
        versions: By table, the version after which it reads and the one up to which it does.

    Raises:
        UserError: the experiment holds others.
        GoneError: what was added after a version is gone already; nothing is held then.
    """
    known = {h.table: (h.after_version, h.up_to_version) for h in held(log) if h.experiment == experiment}
    if known == dict(versions):
        return
    if known:
        told = ", ".join(f"{table} {first} to {last}" for table, (first, last) in known.items())
        raise UserError(f"experiment {experiment} holds {told}: take another --name, or release it first")
    _write(log, experiment, versions, released=False)
    try:
        # Behind the row, so that what is there now stays.
        for table, (first, _) in versions.items():
            log.check_kept(table, first)
    except BaseException:
        _write(log, experiment, versions, released=True)
        raise


def release(log: DeltaLog, experiment: str) -> list[Hold]:
    """Let go of what an experiment holds; gives what that was.

    Raises:
        UserError: it holds nothing.
    """
    let_go = [h for h in held(log) if h.experiment == experiment]
    if not let_go:
        names = ", ".join(sorted({h.experiment for h in held(log)})) or "none"
        raise UserError(f"no experiment {experiment} holds anything; those that do: {names}")
    _write(log, experiment, {h.table: (h.after_version, h.up_to_version) for h in let_go}, released=True)
    return let_go


def kept(log: DeltaLog, one: Hold) -> Kept:
    """What a hold keeps, from the table's log alone.

    Raises:
        TableError: the log cannot be read.
    """
    newest = set(log.files(one.table))
    sizes = dict(_added(log, one))
    return Kept(sum(sizes.values()), sum(size for path, size in sizes.items() if path not in newest))


def _added(log: DeltaLog, one: Hold) -> Iterator[tuple[str, int]]:
    """Path and bytes of every file with rows that are new."""
    store = log.store(one.table)
    with log.failures(one.table):
        for version in range(one.after_version + 1, one.up_to_version + 1):
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
