"""From a request to the versions that learned from it: where its rows are, and who has read so far.

A version's tags say up to which version of ``accepted`` its trainer had read, and up to which every window had its
turn. A request whose last commit lies at or before the second has taught the version; one between the two may have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from pipeline.offsets import SourcePartition
from pipeline.trace_queries import find_commit
from schemas.errors import UserError
from schemas.telemetry.trace_context import request_context

if TYPE_CHECKING:
    from pipeline.delta import DeltaLog
    from schemas.events import AliasMoved
    from trainer.release.registry import SpeculatorRegistry, Version

Taught = Literal["yes", "partly", "no", "held out"]
TOLD_TABLES = ("traces", "accepted", "rejected")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a request in one table, from one partition."""

    table: str
    topic: str
    partition: int
    first_offset: int
    last_offset: int
    rows: int
    first_version: int | None
    """Of the table, by the commits that brought the rows; None while a commit runs."""
    last_version: int | None


@dataclass(frozen=True, slots=True)
class Reader:
    """A version, and what the request has to do with it."""

    version: str
    taught: Taught
    registered: datetime
    parent: str | None
    moves: tuple[AliasMoved, ...]
    """Of aliases that came to name it."""
    served: datetime | None
    """Time of its first verify step in ``traces``."""


@dataclass(frozen=True, slots=True)
class Trail:
    """What became of a request."""

    request: str
    trace: str
    node: str
    line: str
    time: datetime
    """Of its first verify step."""
    drafted_by: tuple[str, ...]
    rows: tuple[Rows, ...]
    versions: tuple[Reader, ...]

    @property
    def first(self) -> Reader | None:
        """The oldest version that has learned from all of it."""
        return next((reader for reader in self.versions if reader.taught == "yes"), None)


def trails(tables: DeltaLog, registry: SpeculatorRegistry, named: str) -> list[Trail]:
    """The trails of the requests that an id names: of one by its own, of all of a trace by the trace's.

    Raises:
        UserError: the tables have no rows of it, or are not to be read.
        RegistryError: no answer.
    """
    from pipeline.delta import escape_sql

    of_trace = f" OR request LIKE '%-{named}%'" if re.fullmatch(r"[0-9a-f]{32}", named) else ""
    found = tables.query(
        'SELECT request, node, line, MIN("time") AS "time", array_agg(DISTINCT speculator) AS drafted_by FROM traces '  # noqa: S608 - escaped
        f"WHERE request = '{escape_sql(named)}'{of_trace} GROUP BY request, node, line ORDER BY 4"
    )
    requests = found.read_all().to_pylist()
    if not requests:
        raise UserError(
            f"no rows of {named!r} in table traces: it was not traced, is on its way, became a dead letter "
            f"(`aurora dead list`), or is older than tables.traces_retention"
        )
    return [
        Trail(
            request=one["request"],
            trace=request_context(one["request"]).trace_id,
            node=one["node"],
            line=one["line"],
            time=one["time"],
            drafted_by=tuple(sorted(filter(None, one["drafted_by"]))),
            rows=(rows := _rows(tables, one["request"])),
            versions=_readers(tables, registry, one["line"], one["request"], rows),
        )
        for one in requests
    ]


def taught(tags: Mapping[str, str], request: str, commits: Sequence[int | None]) -> Taught:
    """Whether a version has learned from a request whose windows came with these commits of ``accepted``."""
    from trainer.data.data_loader import is_held_out
    from trainer.release.registration import PASSED_TAG, SETTINGS_TAG

    shaped_by = json.loads(tags.get(SETTINGS_TAG, "{}"))
    if is_held_out(request, shaped_by.get("train", {}).get("held_out_ratio", 0.0)):
        return "held out"
    read = json.loads(tags.get("tables", "{}")).get("accepted", 0)
    passed = int(tags.get(PASSED_TAG, "0"))
    if commits and all(commit is not None and commit <= passed for commit in commits):
        return "yes"
    return "partly" if any(commit is not None and commit <= read for commit in commits) else "no"


def _rows(tables: DeltaLog, request: str) -> tuple[Rows, ...]:
    from pipeline.delta import escape_sql

    rows: list[Rows] = []
    for name in TOLD_TABLES:
        found = tables.query(
            'SELECT topic, partition, MIN("offset") AS first, MAX("offset") AS last, COUNT(*) AS rows '  # noqa: S608 - escaped
            f"FROM {name} WHERE request = '{escape_sql(request)}' GROUP BY topic, partition ORDER BY topic, partition"
        )
        for one in found.read_all().to_pylist():
            source = SourcePartition(one["topic"], one["partition"])
            first, last = (find_commit(tables, name, source, one[end]) for end in ("first", "last"))
            rows.append(Rows(name, *source, one["first"], one["last"], one["rows"], first, last))
    return tuple(rows)


def _readers(
    tables: DeltaLog, registry: SpeculatorRegistry, line: str, request: str, rows: Sequence[Rows]
) -> tuple[Reader, ...]:
    from trainer.release.audit import read_moves

    commits = [end for part in rows if part.table == "accepted" for end in (part.first_version, part.last_version)]
    moves = [move for move in read_moves(tables) if move.line == line]
    served = _served(tables, line)

    def reader(version: Version) -> Reader:
        return Reader(
            version=version.number,
            taught=taught(version.tags, request, commits),
            registered=version.registered,
            parent=version.tags.get("parent"),
            moves=tuple(move for move in moves if move.to_version == version.number),
            served=served.get(version.number),
        )

    return tuple(map(reader, registry.versions(line)))


def _served(tables: DeltaLog, line: str) -> dict[str, datetime]:
    """When each version of a line drafted its first verify step."""
    from pipeline.delta import escape_sql

    found = tables.query(
        'SELECT speculator, MIN("time") AS "time" FROM traces '  # noqa: S608 - escaped
        f"WHERE line = '{escape_sql(line)}' GROUP BY speculator"
    )
    return {row["speculator"]: row["time"] for row in found.read_all().to_pylist()}
