"""Queries over the tables: acceptance statistics, the newest verify steps, and the commit of a record.

The query engine counts. The depth of draft trees is computed here, once for each shape. Statistics cover every verify
step except the prompt's; a step without a draft counts too. In the group of a version only its own drafts count
(``schemas.trace.own_draft``), in verify steps in which it has one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.delta import DeltaLog, TableError
from pipeline.offsets import SourcePartition
from schemas.draft_tree import depths
from schemas.trace.own_draft import find_own_drafts
from schemas.trace.record import DraftSource

Group = Literal["line", "speculator", "label", "node"]
TRACE_TABLES = ("accepted", "rejected", "traces")
"""Tables with rows of traffic."""
SHOWN_COLUMNS = (
    "time",
    "node",
    "request",
    "chunk",
    "verify_step",
    "speculator",
    "label",
    "draft_tokens",
    "accepted",
    "bonus",
    "draft_sources",
)
_FIRST_COMMITS = 4
"""Commits that are read first; four times as many each time they hold too few verify steps."""


class DraftShape(NamedTuple):
    """What is counted of the draft of a verify step."""

    draft_tokens: int
    depth: int
    accepted_tokens: int
    suffix_accepted_tokens: int = 0


@dataclass
class GroupStats:
    """Statistics of a group of verify steps."""

    requests: int = 0
    tokens: int = 0
    """Output tokens: every token that the target chose."""
    verify_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    suffix_accepted_tokens: int = 0
    """Accepted tokens that only the suffix drafter proposed; in the group of a version 0."""
    drafted_to: Counter[int] = field(default_factory=Counter)
    """Verify steps whose draft has at least this depth, by depth from 1."""
    accepted_to: Counter[int] = field(default_factory=Counter)
    """Verify steps that drafted at least this deep and in which the target accepted this depth."""

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens per verify step, bonus token included; None without verify steps."""
        return 1 + self.accepted_tokens / self.verify_steps if self.verify_steps else None

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Ratio of the drafts of at least each depth that were accepted to that depth."""
        return [self.accepted_to[depth] / self.drafted_to[depth] for depth in sorted(self.drafted_to)]

    def add(self, draft: DraftShape, verify_steps: int) -> None:
        """Count verify steps with the same draft."""
        self.verify_steps += verify_steps
        self.draft_tokens += verify_steps * draft.draft_tokens
        self.accepted_tokens += verify_steps * draft.accepted_tokens
        self.suffix_accepted_tokens += verify_steps * draft.suffix_accepted_tokens
        for depth in range(1, draft.depth + 1):
            self.drafted_to[depth] += verify_steps
            self.accepted_to[depth] += verify_steps if draft.accepted_tokens >= depth else 0


@dataclass(frozen=True, slots=True)
class ChunkCounts:
    """Completeness of the requests in the table."""

    unfinished: int
    """Requests without their last chunk: they still run, or were cut off."""
    missing: int
    """Chunks that are missing before other chunks of their request."""


@dataclass(frozen=True, slots=True)
class TraceStats:
    """Statistics of all tables."""

    total: GroupStats
    groups: Mapping[str, GroupStats]
    chunks: ChunkCounts
    dead_letters: Mapping[str, int]
    """Number of dead letters by reason."""
    table_bytes: Mapping[str, int]
    """Bytes of the files of the newest table versions."""
    table_tokens: int
    """Tokens in those files, prompts included."""

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes in the tables per token; None without tokens."""
        return sum(self.table_bytes.values()) / self.table_tokens if self.table_tokens else None


def compute_stats(tables: DeltaLog, by: Group | None = None, since: datetime | None = None) -> TraceStats:
    """Compute the statistics of the rows since a time. Table bytes and tokens cover all rows.

    Raises:
        TableError: the tables cannot be read.
    """
    tokens = "select cast(sum(cardinality(tokens)) as bigint) as tokens from traces"
    return TraceStats(
        total=_count_steps(tables, None, since).get("", GroupStats()),
        groups=_count_steps(tables, by, since) if by else {},
        chunks=_count_chunks(tables, since),
        dead_letters=_count_dead_letters(tables, since),
        table_bytes={name: tables.size(name) for name in TRACE_TABLES},
        table_tokens=_query_row(tables, tokens)["tokens"] or 0,
    )


def read_newest_steps(tables: DeltaLog, count: int) -> tuple[pa.Table, int]:
    """Return the last ``count`` verify steps in the order of their commits, and the table version of the last one.

    Raises:
        TableError: the table cannot be read.
    """
    version, oldest = tables.version("traces"), tables.oldest_readable("traces")
    commits = _FIRST_COMMITS
    while True:
        start = max(oldest, version - commits)
        rows = tables.read_added("traces", start, version, SHOWN_COLUMNS)
        if rows.num_rows >= count or start == oldest:
            return rows.slice(max(0, rows.num_rows - count)), version
        commits *= 4


def follow_steps(tables: DeltaLog, version: int, poll_s: float) -> Iterator[pa.Table]:
    """Yield the verify steps of each commit after ``version``, without end.

    Raises:
        TableError: the table cannot be read.
    """
    while True:
        newest = tables.version("traces")
        if newest > version:
            yield tables.read_added("traces", version, newest, SHOWN_COLUMNS)
            version = newest
        else:
            time.sleep(poll_s)


def find_commit(tables: DeltaLog, name: str, source: SourcePartition, offset: int) -> int | None:
    """Return the table version whose commit added the rows of a record; None if no version contains it.

    For a commit that the log lacks, the oldest version that can be opened is returned.

    Raises:
        TableError: the newest version cannot be read.
    """
    newest = tables.version(name)
    if tables.last_offset(name, source) < offset:
        return None
    low, high = 1, newest
    while low < high:
        middle = (low + high) // 2
        try:
            last = tables.last_offset(name, source, middle)
        except TableError:
            last = -1  # the version is too old to be opened
        if last >= offset:
            high = middle
        else:
            low = middle + 1
    return high


def _count_steps(tables: DeltaLog, by: Group | None, since: datetime | None) -> dict[str, GroupStats]:
    """Return the statistics by group; of all verify steps under the empty name without groups."""
    group = f"coalesce({by}, '')" if by else "''"
    counts = (
        f"select {group} as name, count(distinct concat(node, '/', request)) as requests, "  # noqa: S608 - names of columns
        f"cast(sum(case when bonus is null then 0 else 1 + cardinality(accepted) end) as bigint) as tokens "
        f"from traces where {_since(since)} group by 1 order by 1"
    )
    shapes = (
        f"select {group} as name, speculator <> '' as drafted, draft_parents, accepted, draft_sources, "  # noqa: S608 - names of columns
        f"count(*) as verify_steps from traces where verify_step > 0 and {_since(since)} group by 1, 2, 3, 4, 5"
    )
    found = {
        row["name"]: GroupStats(requests=row["requests"], tokens=row["tokens"]) for row in _query_rows(tables, counts)
    }
    for rows in tables.query(shapes):
        for name, draft, verify_steps in _read_shapes(pa.Table.from_batches([rows]), of_version=by == "speculator"):
            found.setdefault(name, GroupStats()).add(draft, verify_steps)
    return found


def _read_shapes(rows: pa.Table, *, of_version: bool) -> Iterator[tuple[str, DraftShape, int]]:
    """Yield group, draft and number of verify steps; of the groups of versions their own drafts."""
    versions = pc.if_else(rows["drafted"], "version", "")
    own = find_own_drafts(rows.append_column("speculator", versions))
    for row, *own_draft in zip(rows.to_pylist(), own.draft_tokens, own.depth, own.accepted_tokens, strict=True):
        if of_version and row["drafted"]:
            draft = DraftShape(*map(int, own_draft))
            if not draft.draft_tokens:
                continue
        else:
            parents, accepted, sources = row["draft_parents"], row["accepted"], row["draft_sources"]
            by_suffix = sum(sources[node] == DraftSource.SUFFIX for node in accepted) if sources else 0
            draft = DraftShape(len(parents), max(depths(parents), default=0), len(accepted), by_suffix)
        yield row["name"], draft, row["verify_steps"]


def _count_chunks(tables: DeltaLog, since: datetime | None) -> ChunkCounts:
    # A request that began earlier lacks its first chunks.
    first = "0" if since is None else "min(chunk)"
    counted = _query_row(
        tables,
        f"select cast(sum(missing) as bigint) as missing, count(*) filter (where not finished) as unfinished from "  # noqa: S608 - names of columns
        f"(select max(chunk) - {first} + 1 - count(distinct chunk) as missing, bool_or(last_chunk) as finished "
        f"from traces where {_since(since)} group by node, request)",
    )
    return ChunkCounts(counted["unfinished"], counted["missing"] or 0)


def _count_dead_letters(tables: DeltaLog, since: datetime | None) -> dict[str, int]:
    rows = _query_rows(
        tables,
        f"select reason, count(*) as letters from dead_letters where reason <> 'hole' and {_since(since)} "  # noqa: S608 - names of columns
        f"group by 1 order by 2 desc, 1",
    )
    return {row["reason"]: row["letters"] for row in rows}


def _since(since: datetime | None) -> str:
    """Return a SQL condition. The condition on the day, which is the broker's, skips the files of earlier days."""
    if since is None:
        return "true"
    day = (since.astimezone(UTC) - timedelta(days=1)).date()
    return f"(time >= to_timestamp_micros({round(since.timestamp() * 1e6)}) and day >= '{day}')"


def _query_rows(tables: DeltaLog, sql: str) -> Iterable[dict[str, Any]]:
    for batch in tables.query(sql):
        yield from batch.to_pylist()


def _query_row(tables: DeltaLog, sql: str) -> dict[str, Any]:
    (row,) = _query_rows(tables, sql)
    return row
