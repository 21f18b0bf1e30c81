"""Requests of the past, put together again from the tables: every token, with its features and what the target said.

A window of ``accepted`` ends with its chunk, but the next chunk of its request begins at the very next token. So where
all chunks of a request are there, joined they are the whole request, and nothing is lost at their borders. Where one is
missing (shed, a dead letter, a day that was let go), the draft's state behind the gap is not known: such a request is
left out, and counted.

Requests that began in a span of time are listed from ``traces`` alone; windows are then read for a few of them at a
time, which bounds memory, by the offsets of their records, which lets the query skip most files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from pipeline.delta import DeltaLog, Moment, escape_sql
from trainer.data.rows import ACCEPTED_COLUMNS, window_of
from trainer.data.samples import Teacher

PER_READ = 64
"""Requests whose windows are in memory at a time: with the default features about 0.5 MB each."""

States = Callable[[Tensor], Tensor]
"""Gives the target's captured states [n, F] in bf16 after each of the first n tokens of a request."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which requests of the past."""

    target: str
    """Fingerprint that answered them."""
    begin: datetime | None = None
    """Not before."""
    end: datetime | None = None
    """Before."""
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens were drawn."""

    temperature: float
    top_p: float
    top_k: int

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token was taken."""
        return self.temperature <= 0


@dataclass(frozen=True, slots=True)
class Listed:
    """A request as ``traces`` tells of it."""

    request: str
    began: datetime
    label: str | None
    sampling: Sampling
    chunks: int
    whole: bool
    """Whether its end is there, and no chunk is missing before it."""
    offsets: tuple[int, int]
    """First and last of its records."""


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """A whole request. N tokens, F feature width, k teacher width."""

    request: str
    label: str | None
    sampling: Sampling
    tokens_N: Tensor
    """int64: the prompt and the answer."""
    features_NF: Tensor
    """[N - 1, F] bf16: after each token but the last, which the target never consumed."""
    prompt: int
    """Tokens of the prompt: the first root of a verify step stands there."""
    teacher: Teacher
    """[N - prompt, k]: what the target said after the last token of the prompt, and after each of the answer's but the
    last: row i belongs to the token that stands at ``prompt + i``."""


def pinned(log: DeltaLog, accepted: int | None = None) -> dict[str, int]:
    """The states of the tables that are read from now on, whatever is appended meanwhile."""
    return {
        "accepted": log.version("accepted") if accepted is None else accepted,
        "traces": log.version("traces"),
    }


def listed(log: DeltaLog, wanted: Wanted, at: Mapping[str, Moment]) -> list[Listed]:
    """The requests that began in the span, by the time of their first verify step; those of one time by their ids.

    Raises:
        TableError: the tables cannot be read.
    """
    rows = log.query(
        "SELECT request, min(time) AS began, min(label) AS label, min(temperature) AS temperature, "  # noqa: S608
        "min(top_p) AS top_p, min(sampling_top_k) AS top_k, count(DISTINCT chunk) AS chunks, max(chunk) AS last, "
        'bool_or(last_chunk) AS ended, min("offset") AS first_offset, max("offset") AS last_offset '
        f"FROM traces WHERE target = '{wanted.target}' GROUP BY request ORDER BY began, request",
        at,
    )
    return [_listed(row) for batch in rows for row in batch.to_pylist() if _is_wanted(row, wanted)]


def read(
    log: DeltaLog, chosen: Sequence[Listed], at: Mapping[str, Moment], states: States, counts: Counter[str]
) -> Iterator[Past]:
    """The requests in the given order.

    Args:
        log: Where the tables are.
        chosen: The requests, as ``listed`` gives them.
        at: The states of the tables.
        states: Gives the features that did not travel.
        counts: Takes what became of the requests: ``requests``, ``incomplete``, ``recomputed``.

    Raises:
        TableError: the tables cannot be read.
    """
    whole = [one for one in chosen if one.whole]
    counts["incomplete"] += len(chosen) - len(whole)
    for start in range(0, len(whole), PER_READ):
        some = whole[start : start + PER_READ]
        windows = _windows(log, some, at)
        for one in some:
            past = join(one, windows.get(one.request, []), states, counts)
            counts["incomplete" if past is None else "requests"] += 1
            if past is not None:
                yield past


def join(
    one: Listed, rows: Sequence[Mapping[str, Any]], states: States, counts: Counter[str] | None = None
) -> Past | None:
    """A request from the rows of its windows, in the order of their chunks; None where they leave a gap.

    A window that was sent without features begins with the request each time: what it repeats is passed over.
    """
    tokens: list[Tensor] = []
    features: list[Tensor] = []
    teachers: list[Teacher] = []
    length, prompt, last = 0, None, None
    for row in rows:
        window = window_of(row, [])
        new = length - row["position"]
        if not 0 <= new <= len(window) or (row["position"] and not len(window.features)):
            return None
        fresh = window.known[new:]
        if prompt is None and bool(fresh.any()):
            prompt = length + int(fresh.nonzero()[0]) + 1
        tokens.append(window.tokens[new:])
        features.append(window.features[new:])
        teachers.append(window.teacher[len(window.teacher.ids) - int(fresh.sum()) :])
        length, last = length + len(window) - new, window.next_token
    if prompt is None or last is None:
        return None
    tokens_N = torch.cat([*tokens, torch.tensor([last])])
    features_NF = torch.cat(features)
    if len(features_NF) < length:
        features_NF = states(tokens_N[:-1])
        if counts is not None:
            counts["recomputed"] += 1
    width = min(teacher.ids.shape[1] for teacher in teachers)
    teacher = Teacher(*(torch.cat([getattr(t, name)[:, :width] for t in teachers]) for name in ("ids", "logprobs")))
    if len(teacher.ids) != len(tokens_N) - prompt:
        return None
    return Past(one.request, one.label, one.sampling, tokens_N, features_NF, prompt, teacher)


def _windows(log: DeltaLog, some: Sequence[Listed], at: Mapping[str, Moment]) -> dict[str, list[dict[str, Any]]]:
    """Rows of ``accepted`` by request, in the order of their chunks."""
    names = ", ".join(f"'{escape_sql(one.request)}'" for one in some)
    first, last = min(one.offsets[0] for one in some), max(one.offsets[1] for one in some)
    columns = ", ".join(f'"{column}"' for column in ("chunk", *ACCEPTED_COLUMNS))
    rows = log.query(
        f'SELECT {columns} FROM accepted WHERE "offset" >= {first} AND "offset" <= {last} '  # noqa: S608
        f"AND request IN ({names}) ORDER BY request, chunk",
        {"accepted": at["accepted"]},
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for batch in rows:
        for row in batch.to_pylist():
            found.setdefault(row["request"], []).append(row)
    return found


def _listed(row: Mapping[str, Any]) -> Listed:
    return Listed(
        request=row["request"],
        began=row["began"],
        label=row["label"],
        sampling=Sampling(row["temperature"], row["top_p"], row["top_k"]),
        chunks=row["chunks"],
        whole=row["ended"] and row["chunks"] == row["last"] + 1,
        offsets=(row["first_offset"], row["last_offset"]),
    )


def _is_wanted(row: Mapping[str, Any], wanted: Wanted) -> bool:
    began = row["began"] if row["began"].tzinfo else row["began"].replace(tzinfo=UTC)
    return (
        (wanted.begin is None or began >= wanted.begin)
        and (wanted.end is None or began < wanted.end)
        and wanted.label in (None, row["label"])
    )
