"""Find the rows of a request and the speculator versions trained on it.

The tags of a version name the version of ``accepted`` up to which its trainer had read, and the one up to which it had
trained on every sample. A version is trained on a request whose last commit is at or before the second one; between
the two, it may be.
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

TrainedOn = Literal["yes", "partly", "no", "held out"]
REQUEST_TABLES = ("traces", "accepted", "rejected")


@dataclass(frozen=True, slots=True)
class RequestRows:
    """Rows of a request in one table, from one partition."""

    table: str
    topic: str
    partition: int
    first_offset: int
    last_offset: int
    rows: int
    first_version: int | None
    """Table version of the commit of the first row; None while a commit runs."""
    last_version: int | None


@dataclass(frozen=True, slots=True)
class VersionLineage:
    """A version and its relation to the request."""

    version: str
    trained_on: TrainedOn
    registered: datetime
    parent: str | None
    moves: tuple[AliasMoved, ...]
    """Moves of an alias to this version."""
    served: datetime | None
    """Time of its first verify step in ``traces``."""


@dataclass(frozen=True, slots=True)
class RequestLineage:
    """A request, its rows, and the versions of its line."""

    request: str
    trace: str
    node: str
    line: str
    time: datetime
    """Time of its first verify step."""
    drafted_by: tuple[str, ...]
    rows: tuple[RequestRows, ...]
    versions: tuple[VersionLineage, ...]

    @property
    def first(self) -> VersionLineage | None:
        """Oldest version that is trained on the whole request."""
        return next((version for version in self.versions if version.trained_on == "yes"), None)


def read_lineage(tables: DeltaLog, registry: SpeculatorRegistry, id_: str) -> list[RequestLineage]:
    """Return the lineage of one request by its id, or of all requests of a trace by the trace id.

    Raises:
        UserError: the tables have no rows of it, or cannot be read.
        RegistryError: the registry does not answer.
    """
    from pipeline.delta import escape_sql

    of_trace = f" OR request LIKE '%-{id_}%'" if re.fullmatch(r"[0-9a-f]{32}", id_) else ""
    found = tables.query(
        'SELECT request, node, line, MIN("time") AS "time", '  # noqa: S608 - escaped
        "array_agg(DISTINCT speculator) FILTER (WHERE cardinality(draft_tokens) > 0) AS drafted_by FROM traces "
        f"WHERE request = '{escape_sql(id_)}'{of_trace} GROUP BY request, node, line ORDER BY 4"
    )
    requests = found.read_all().to_pylist()
    if not requests:
        raise UserError(
            f"no rows of {id_!r} in table traces: it was not traced, is in flight, became a dead letter "
            f"(`aurora dlq list`), or is older than tables.traces_retention"
        )
    return [
        RequestLineage(
            request=one["request"],
            trace=request_context(one["request"]).trace_id,
            node=one["node"],
            line=one["line"],
            time=one["time"],
            drafted_by=tuple(sorted(filter(None, one["drafted_by"] or ()))),
            rows=(rows := _read_rows(tables, one["request"])),
            versions=_read_versions(tables, registry, one["line"], one["request"], rows),
        )
        for one in requests
    ]


def is_trained_on(tags: Mapping[str, str], prompt_key: str, commits: Sequence[int | None]) -> TrainedOn:
    """Return whether a version is trained on a request with this key and samples in these commits of ``accepted``."""
    from trainer.data.held_out import is_held_out
    from trainer.release.registration import PASSED_TAG, SETTINGS_TAG

    shaped_by = json.loads(tags.get(SETTINGS_TAG, "{}"))
    if is_held_out(prompt_key, shaped_by.get("train", {}).get("held_out_ratio", 0.0)):
        return "held out"
    read = json.loads(tags.get("tables", "{}")).get("accepted", 0)
    passed = int(tags.get(PASSED_TAG, "0"))
    if commits and all(commit is not None and commit <= passed for commit in commits):
        return "yes"
    return "partly" if any(commit is not None and commit <= read for commit in commits) else "no"


def _read_rows(tables: DeltaLog, request: str) -> tuple[RequestRows, ...]:
    from pipeline.delta import escape_sql

    rows: list[RequestRows] = []
    for name in REQUEST_TABLES:
        found = tables.query(
            'SELECT topic, partition, MIN("offset") AS first, MAX("offset") AS last, COUNT(*) AS rows '  # noqa: S608 - escaped
            f"FROM {name} WHERE request = '{escape_sql(request)}' GROUP BY topic, partition ORDER BY topic, partition"
        )
        for one in found.read_all().to_pylist():
            source = SourcePartition(one["topic"], one["partition"])
            first, last = (find_commit(tables, name, source, one[end]) for end in ("first", "last"))
            rows.append(RequestRows(name, *source, one["first"], one["last"], one["rows"], first, last))
    return tuple(rows)


def _read_versions(
    tables: DeltaLog, registry: SpeculatorRegistry, line: str, request: str, rows: Sequence[RequestRows]
) -> tuple[VersionLineage, ...]:
    from trainer.release.audit import read_moves

    prompt_key = _read_prompt_key(tables, request)
    commits = [end for part in rows if part.table == "accepted" for end in (part.first_version, part.last_version)]
    moves = [move for move in read_moves(tables) if move.line == line]
    served = _read_first_served(tables, line)

    def relate(version: Version) -> VersionLineage:
        return VersionLineage(
            version=version.number,
            trained_on=is_trained_on(version.tags, prompt_key, commits),
            registered=version.registered,
            parent=version.tags.get("parent"),
            moves=tuple(move for move in moves if move.to_version == version.number),
            served=served.get(version.number),
        )

    return tuple(map(relate, registry.versions(line)))


def _read_prompt_key(tables: DeltaLog, request: str) -> str:
    from pipeline.delta import escape_sql

    query = f"SELECT max(prompt_key) AS key FROM accepted WHERE request = '{escape_sql(request)}'"  # noqa: S608 - escaped
    return tables.query(query).read_all()["key"][0].as_py() or request


def _read_first_served(tables: DeltaLog, line: str) -> dict[str, datetime]:
    """Return the time of the first verify step that each version of a line served."""
    from pipeline.delta import escape_sql

    found = tables.query(
        'SELECT speculator, MIN("time") AS "time" FROM traces '  # noqa: S608 - escaped
        f"WHERE line = '{escape_sql(line)}' GROUP BY speculator"
    )
    return {row["speculator"]: row["time"] for row in found.read_all().to_pylist()}
