"""Figures over the tables: how often drafts are accepted, what is missing, what a token costs.

The query engine counts; what a tree of drafts means is worked out here, once for every shape. A verify step is any
verify step but the prompt's. Accepted tokens per step is the drafted tokens kept per verify step, the bonus token
excluded, also over
verify steps in which nothing was drafted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pipeline.delta import DeltaLog
from schemas.trace.record import ROOT

Group = Literal["line", "speculator", "label", "node"]
TRACED = ("accepted", "rejected", "traces")
"""Tables that a token of traffic takes room in."""


@dataclass
class Figures:
    """What a group of verify steps comes to."""

    requests: int = 0
    tokens: int = 0
    """Of answers: every token that the target chose."""
    verify_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    tried: Counter[int] = field(default_factory=Counter)
    """Verify steps whose draft was at least so deep, by depth from 1."""
    kept: Counter[int] = field(default_factory=Counter)
    """Verify steps of those in which the target took at least so many."""

    @property
    def accepted_per_step(self) -> float | None:
        """Drafted tokens kept per verify step; None without verify steps."""
        return self.accepted / self.verify_steps if self.verify_steps else None

    @property
    def acceptance(self) -> list[float]:
        """For each depth the share of the drafts so deep that were accepted that far."""
        return [self.kept[depth] / self.tried[depth] for depth in sorted(self.tried)]

    def add(self, parents: Sequence[int], kept: int, verify_steps: int) -> None:
        """Count verify steps with a draft of one shape of which so many nodes were kept."""
        self.verify_steps += verify_steps
        self.drafted += verify_steps * len(parents)
        self.accepted += verify_steps * kept
        for depth in range(1, depth_of(parents) + 1):
            self.tried[depth] += verify_steps
            self.kept[depth] += verify_steps if kept >= depth else 0


@dataclass(frozen=True, slots=True)
class Chunks:
    """What of the requests is there."""

    unfinished: int
    """Requests whose last chunk has not come: they run, or were cut off."""
    missing: int
    """Chunks that are missing before others of their request."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Everything at one moment."""

    total: Figures
    groups: Mapping[str, Figures]
    chunks: Chunks
    dead_letters: Mapping[str, int]
    """By reason."""
    table_bytes: Mapping[str, int]
    """Of the files that the newest states of the tables consist of."""
    table_tokens: int
    """Tokens that those hold, prompts included."""

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes in the tables for each token that went through a target; None without tokens."""
        return sum(self.table_bytes.values()) / self.table_tokens if self.table_tokens else None


def stats(tables: DeltaLog, by: Group | None = None, since: datetime | None = None) -> Stats:
    """Count everything; the bytes are those of all rows, whatever ``since`` says.

    Raises:
        TableError: the tables cannot be read.
    """
    return Stats(
        total=_figures(tables, None, since).get("", Figures()),
        groups=_figures(tables, by, since) if by else {},
        chunks=_chunks(tables, since),
        dead_letters=_dead_letters(tables, since),
        table_bytes={name: tables.size(name) for name in TRACED},
        table_tokens=_one(tables, "select cast(sum(cardinality(tokens)) as bigint) as tokens from traces")["tokens"]
        or 0,
    )


def depth_of(parents: Sequence[int]) -> int:
    """Tokens on the longest path of a draft; ``parents`` as in ``schemas.trace.record.VerifyStep``."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    return max(depths, default=0)


def _figures(tables: DeltaLog, by: Group | None, since: datetime | None) -> dict[str, Figures]:
    """By group; of all verify steps under the empty name where there are no groups."""
    group = f"coalesce({by}, '')" if by else "''"
    counts = (
        f"select {group} as name, count(distinct concat(node, '/', request)) as requests, "  # noqa: S608 - names of columns
        f"cast(sum(case when bonus is null then 0 else 1 + cardinality(accepted) end) as bigint) as tokens "
        f"from traces where {_since(since)} group by 1 order by 1"
    )
    shapes = (
        f"select {group} as name, draft_parents, cast(cardinality(accepted) as int) as kept, count(*) as verify_steps "  # noqa: S608 - names of columns
        f"from traces where verify_step > 0 and {_since(since)} group by 1, 2, 3"
    )
    found = {row["name"]: Figures(requests=row["requests"], tokens=row["tokens"]) for row in _rows(tables, counts)}
    for row in _rows(tables, shapes):
        found.setdefault(row["name"], Figures()).add(row["draft_parents"], row["kept"], row["verify_steps"])
    return found


def _chunks(tables: DeltaLog, since: datetime | None) -> Chunks:
    # Of a request that began before, the first chunks are not looked at.
    first = "0" if since is None else "min(chunk)"
    counted = _one(
        tables,
        f"select cast(sum(missing) as bigint) as missing, count(*) filter (where not finished) as unfinished from "  # noqa: S608 - names of columns
        f"(select max(chunk) - {first} + 1 - count(distinct chunk) as missing, bool_or(last_chunk) as finished "
        f"from traces where {_since(since)} group by node, request)",
    )
    return Chunks(counted["unfinished"], counted["missing"] or 0)


def _dead_letters(tables: DeltaLog, since: datetime | None) -> dict[str, int]:
    rows = _rows(
        tables,
        f"select reason, count(*) as letters from dead_letters where {_since(since)} group by 1 order by 2 desc, 1",  # noqa: S608 - names of columns
    )
    return {row["reason"]: row["letters"] for row in rows}


def _since(since: datetime | None) -> str:
    """A condition of SQL; the day, which is the broker's, spares the engine the files of earlier ones."""
    if since is None:
        return "true"
    day = (since.astimezone(UTC) - timedelta(days=1)).date()
    return f"(time >= to_timestamp_micros({round(since.timestamp() * 1e6)}) and day >= '{day}')"


def _rows(tables: DeltaLog, sql: str) -> Iterable[dict[str, Any]]:
    for batch in tables.query(sql):
        yield from batch.to_pylist()


def _one(tables: DeltaLog, sql: str) -> dict[str, Any]:
    (row,) = _rows(tables, sql)
    return row
