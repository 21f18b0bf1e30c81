"""Past requests, reassembled from the tables: every token, with its features and the target's distribution.

A sample of ``accepted`` ends with its chunk, and the next chunk of its request starts at the next token. Where all
chunks of a request exist, joined they are the whole request, without loss at their borders. Where a chunk is missing
(dropped, dead-lettered, or expired), the draft's state after the gap is unknown: such a request is skipped and counted.

The requests of a time span are listed from ``traces`` alone. Samples are then read for a few requests at a time, which
bounds memory, and by the offsets of their records, which lets the query skip most files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

from pipeline.delta import DeltaLog, Moment, escape_sql
from trainer.data.samples import (
    ACCEPTED_COLUMNS,
    ComputeStates,
    RequestSampling,
    Row,
    Teacher,
    join_samples,
    provides_features,
    read_sample,
    recompute_features,
)

REQUESTS_PER_READ = 64
"""Requests whose samples are in memory at a time; about 0.5 MB each with the default features."""


@dataclass(frozen=True, slots=True)
class RequestFilter:
    """Which past requests to read."""

    target: str
    """Fingerprint of the target that answered them."""
    begin: datetime | None = None
    """Earliest start, inclusive."""
    end: datetime | None = None
    """Latest start, exclusive."""
    label: str | None = None


@dataclass(frozen=True, slots=True)
class RequestService:
    """Where and when a request was answered, by the clock of its node."""

    node: str
    began: datetime
    """Time of its first verify step."""
    ended: datetime
    """Time of its last one."""


@dataclass(frozen=True, slots=True)
class RequestEntry:
    """A request as listed from ``traces``."""

    request: str
    label: str | None
    sampling: RequestSampling
    complete: bool
    """Whether the last chunk exists, and all chunks before it."""
    offsets: tuple[int, int]
    """First and last offset of its records."""
    service: RequestService


@dataclass(frozen=True, slots=True, eq=False)
class PastRequest:
    """A whole request. N tokens, F feature width, k teacher width."""

    request: str
    label: str | None
    sampling: RequestSampling
    service: RequestService
    tokens_N: Tensor
    """int64: prompt and answer."""
    features_NF: Tensor
    """[N - 1, F] bf16: after each token but the last, which the target never consumed."""
    prompt: int
    """Number of prompt tokens; the root of the first verify step is the token at this index."""
    teacher: Teacher
    """[N - prompt, k]: the target's distributions after the last prompt token and after each answer token but the last.
    Row i belongs to the token at ``prompt + i``."""


def pin_versions(log: DeltaLog, accepted: int | None = None) -> dict[str, int]:
    """Return the versions of the tables to read, regardless of later commits."""
    return {
        "accepted": log.version("accepted") if accepted is None else accepted,
        "traces": log.version("traces"),
    }


def list_requests(log: DeltaLog, wanted: RequestFilter, at: Mapping[str, Moment]) -> list[RequestEntry]:
    """List the requests that match the filter, ordered by the time of their first verify step, then by id.

    Raises:
        TableError: the tables cannot be read.
    """
    rows = log.query(
        "SELECT request, min(time) AS began, max(time) AS finished, min(node) AS node, min(label) AS label, "  # noqa: S608
        "min(temperature) AS temperature, min(top_p) AS top_p, min(sampling_top_k) AS top_k, "
        "count(DISTINCT chunk) AS chunks, max(chunk) AS last, bool_or(last_chunk) AS ended, "
        'min("offset") AS first_offset, max("offset") AS last_offset '
        f"FROM traces WHERE target = '{wanted.target}' GROUP BY request ORDER BY began, request",
        at,
    )
    return [_read_entry(row) for batch in rows for row in batch.to_pylist() if _matches(row, wanted)]


def read_requests(
    log: DeltaLog,
    entries: Sequence[RequestEntry],
    at: Mapping[str, Moment],
    compute_states: ComputeStates,
    counts: Counter[str],
) -> Iterator[PastRequest]:
    """Yield the requests in the given order.

    Args:
        log: The tables to read.
        entries: The requests, as ``list_requests`` returns them.
        at: Versions of the tables.
        compute_states: Computes missing features.
        counts: Counts requests by outcome: ``requests``, ``incomplete``, ``recomputed``.

    Raises:
        TableError: the tables cannot be read.
    """
    complete = [entry for entry in entries if entry.complete]
    counts["incomplete"] += len(entries) - len(complete)
    for start in range(0, len(complete), REQUESTS_PER_READ):
        group = complete[start : start + REQUESTS_PER_READ]
        rows = _read_rows(log, group, at)
        for entry in group:
            past = join_chunks(entry, rows.get(entry.request, []), compute_states, counts)
            counts["incomplete" if past is None else "requests"] += 1
            if past is not None:
                yield past


def join_chunks(
    entry: RequestEntry, rows: Sequence[Row], compute_states: ComputeStates, counts: Counter[str]
) -> PastRequest | None:
    """Join the rows of a request, in the order of its chunks; None if they leave a gap."""
    if not rows or rows[0]["position"] or rows[-1]["last_chunk"] is False or not all(map(provides_features, rows)):
        return None
    try:
        whole = join_samples([read_sample(row, []) for row in rows])
    except ValueError:
        return None
    if whole.next_token is None or not bool(whole.known.any()):
        return None
    tokens_N = torch.cat([whole.tokens, torch.tensor([whole.next_token])])
    prompt = int(whole.known.nonzero()[0]) + 1
    if len(whole.teacher.ids) != len(tokens_N) - prompt:
        return None
    if not whole.has_features:
        whole = recompute_features(whole, compute_states)
        counts["recomputed"] += 1
    return PastRequest(
        request=entry.request,
        label=entry.label,
        sampling=entry.sampling,
        service=entry.service,
        tokens_N=tokens_N,
        features_NF=whole.features,
        prompt=prompt,
        teacher=whole.teacher,
    )


def _read_rows(log: DeltaLog, entries: Sequence[RequestEntry], at: Mapping[str, Moment]) -> dict[str, list[Row]]:
    """Return rows of ``accepted`` by request, in the order of their chunks."""
    names = ", ".join(f"'{escape_sql(entry.request)}'" for entry in entries)
    first, last = min(entry.offsets[0] for entry in entries), max(entry.offsets[1] for entry in entries)
    columns = ", ".join(f'"{column}"' for column in ("chunk", *ACCEPTED_COLUMNS))
    batches = log.query(
        f'SELECT {columns} FROM accepted WHERE "offset" >= {first} AND "offset" <= {last} '  # noqa: S608
        f"AND request IN ({names}) ORDER BY request, chunk",
        {"accepted": at["accepted"]},
    )
    rows: dict[str, list[Row]] = {}
    for batch in batches:
        for row in batch.to_pylist():
            rows.setdefault(row["request"], []).append(row)
    return rows


def _read_entry(row: Row) -> RequestEntry:
    return RequestEntry(
        request=row["request"],
        label=row["label"],
        sampling=RequestSampling(row["temperature"], row["top_p"], row["top_k"]),
        complete=row["ended"] and row["chunks"] == row["last"] + 1,
        offsets=(row["first_offset"], row["last_offset"]),
        service=RequestService(row["node"], _in_utc(row["began"]), _in_utc(row["finished"])),
    )


def _matches(row: Row, wanted: RequestFilter) -> bool:
    began = _in_utc(row["began"])
    return (
        (wanted.begin is None or began >= wanted.begin)
        and (wanted.end is None or began < wanted.end)
        and wanted.label in (None, row["label"])
    )


def _in_utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)
