"""Checks headers against the envelope, verify steps against each other, and values against their columns.

The codec rejects rows that contradict themselves. This module also rejects values that the tables cannot hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow.compute as pc

from schemas.trace import record
from schemas.trace.decoder import Array, Bools, Ints, ListColumn, OpenedChunk, RowCheck, VerifyStepColumns
from schemas.trace.record import INT32_MAX, TIME_END_US, DraftSource, TraceError

LINE = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""A line names a folder of the tables. An empty name would be null there, and file systems reject a long one."""

_INFINITE = 0xFF00
"""A bf16 number, shifted left by one bit to drop its sign, is infinite or NaN from this value on."""
_SOURCES = frozenset(range(1, 1 + sum(DraftSource)))
"""Values of ``draft_sources``: every combination of drafters."""
_PIECE = 1 << 17
"""Numbers that are checked together: few enough to stay in the processor's cache."""

HeaderReader = Callable[[str], str | None]
"""Returns the text of a header; None without one."""


def find_other_version(header: HeaderReader) -> str | None:
    """Return the trace format in a record's header if it is another major version than this worker reads."""
    name, _, major = (header("format") or record.FORMAT).partition("/")
    return f"{name}/{major}" if name == record.FORMAT_NAME and major != str(record.FORMAT_MAJOR) else None


def check_headers(header: HeaderReader) -> None:
    """Check the content type that the headers name. The record itself names its format.

    Raises:
        TraceError: it is another one.
    """
    content = header("content-type")
    if content != record.CONTENT_TYPE:
        raise TraceError("foreign_content", f"header content-type is {content!r}, expected {record.CONTENT_TYPE!r}")


def check_envelope(chunk: OpenedChunk, header: HeaderReader) -> None:
    """Check the envelope against its headers and against the types of its columns.

    All headers but the number of rows may be missing; the envelope is authoritative.

    Raises:
        TraceError: the envelope is invalid.
    """
    envelope, rows = chunk.envelope, chunk.rows.num_rows
    if header("rows") != str(rows):
        raise TraceError("wrong_count", f"header rows is {header('rows')!r}, the chunk has {rows} verify steps")
    for name, found in (("target", envelope.target), ("node", envelope.node)):
        if header(name) not in (None, found):
            raise TraceError("header_mismatch", f"header {name} is {header(name)!r}, the envelope says {found!r}")
    if not LINE.fullmatch(envelope.line):
        raise TraceError("bad_line", f"line is {envelope.line[:200]!r}, expected {LINE.pattern}")
    numbers = ("chunk", "feature_width", "top_k", "sampling_top_k", "vocab_size")
    too_large = [name for name in numbers if (getattr(envelope, name) or 0) > INT32_MAX]
    if envelope.seed is not None and not -(2**63) <= envelope.seed < 2**63:
        too_large.append("seed")
    if chunk.rows.get_total_buffer_size() > INT32_MAX:
        too_large.append("features")
    if too_large:
        raise TraceError("too_large", f"does not fit into its column: {', '.join(too_large)}")
    if not (math.isfinite(envelope.temperature) and math.isfinite(envelope.top_p)):
        raise TraceError("bad_number", f"temperature {envelope.temperature}, top_p {envelope.top_p}")
    highest = max(envelope.preceding_tokens, default=0)
    if highest >= (envelope.vocab_size or 2**31):
        detail = f"token id {highest} in preceding_tokens, the vocabulary ends at {envelope.vocab_size}"
        raise TraceError("bad_token", detail)


def find_invalid(steps: VerifyStepColumns, features: ListColumn) -> dict[int, TraceError]:
    """Return the errors of invalid chunks, by chunk; empty if all are valid.

    Args:
        steps: Well-formed verify steps of many chunks.
        features: [rows] the bf16 bit patterns of each row's tokens.
    """
    of_rows = [*_check_fields(steps), *_check_sources(steps), *_check_tokens(steps), *_check_numbers(steps, features)]
    return steps.first_errors([_check_order(steps)]) | steps.first_errors(of_rows)


def _check_fields(steps: VerifyStepColumns) -> Iterator[RowCheck]:
    where, drafted = steps.describe, steps.draft_tokens.lengths

    def check_time(name: str, times: Ints) -> RowCheck:
        return RowCheck(
            (times < 0) | (times >= TIME_END_US),
            "bad_number",
            lambda row: f"{where(row)}: {name} {times[row]} us, expected one before the year 10000",
        )

    yield RowCheck(
        (steps.number < 0) | (steps.position < 0),
        "contradiction",
        lambda row: f"{where(row)} at position {steps.position[row]}",
    )
    yield RowCheck(
        (steps.number == 0) & (drafted > 0),
        "contradiction",
        lambda row: f"{where(row)}: the prompt has no draft, found {drafted[row]} tokens",
    )
    yield from (check_time(name, times) for name, times in (("time", steps.time), ("active_since", steps.active_since)))
    yield RowCheck(
        (steps.number > 0) & ~steps.has_bonus,
        "contradiction",
        lambda row: f"{where(row)}: no bonus token; only a part of the prompt has none",
    )


def _check_sources(steps: VerifyStepColumns) -> Iterator[RowCheck]:
    """Check that each source is known, and that verify steps name a version if it proposed a draft token."""
    sources, where = steps.draft_sources, steps.describe
    known = np.array([source in _SOURCES for source in range(-128, 128)])
    yield RowCheck(
        sources.rows_with(~known[sources.entries.astype(np.int64) + 128]),
        "contradiction",
        lambda row: f"{where(row)}: draft sources {sources.row(row)}, expected only {sorted(_SOURCES)}",
    )
    proposed = sources.rows_with(sources.entries & DraftSource.SPECULATOR != 0)
    named = pc.binary_length(steps.batch.column("speculator")).to_numpy(zero_copy_only=False) > 0

    def detail(row: int) -> str:
        version = steps.batch.column("speculator")[row].as_py()
        return f"{where(row)}: draft sources {sources.row(row)}, but the speculator is {version!r}"

    yield RowCheck(steps.has_sources & (named != proposed), "contradiction", detail)


def _check_tokens(steps: VerifyStepColumns) -> Iterator[RowCheck]:
    """Check token ids against the vocabulary."""
    ends = steps.per_row([envelope.vocab_size or 2**31 for envelope in steps.envelopes])
    smallest_end = int(ends.min(initial=2**31))

    def outside(ids: Array, end: Ints) -> Bools:
        return (ids < 0) | (ids >= end)

    def check(name: str, bad: Bools, ids: Callable[[int], list[int]]) -> RowCheck:
        def detail(row: int) -> str:
            wrong = next(token for token in ids(row) if not 0 <= token < ends[row])
            return f"{steps.describe(row)}: token id {wrong} in {name}, expected 0 to {ends[row] - 1}"

        return RowCheck(bad, "bad_token", detail)

    for name in ("tokens", "draft_tokens", "top_ids"):
        lists: ListColumn = getattr(steps, name)
        ids = lists.entries
        if len(ids) and (ids.min() < 0 or ids.max() >= smallest_end):
            yield check(name, lists.rows_with(outside(ids, ends[lists.entry_rows])), lists.row)
    yield check("bonus", outside(steps.bonus, ends), lambda row: [int(steps.bonus[row])])


def _check_numbers(steps: VerifyStepColumns, features: ListColumn) -> Iterator[RowCheck]:
    """Check for infinite numbers and NaN. Features are most of a chunk, so they are checked piece by piece."""
    bits = features.entries
    infinite = [
        at + np.flatnonzero(piece >= _INFINITE)
        for at in range(0, len(bits), _PIECE)
        if (piece := bits[at : at + _PIECE] << 1).max() >= _INFINITE
    ]
    if infinite:
        bad = np.zeros(len(bits), np.bool_)
        bad[np.concatenate(infinite)] = True
        yield RowCheck(
            features.rows_with(bad),
            "bad_number",
            lambda row: f"{steps.describe(row)}: a feature is infinite or NaN",
        )
    yield RowCheck(
        steps.draft_logprobs.rows_with(np.isinf(steps.draft_logprobs.entries))  # NaN: the node does not know it
        | steps.top_logprobs.rows_with(~np.isfinite(steps.top_logprobs.entries)),
        "bad_number",
        lambda row: f"{steps.describe(row)}: a log-probability is infinite, or the target's is NaN",
    )


def _check_order(steps: VerifyStepColumns) -> RowCheck:
    """Check that the verify steps of a chunk follow each other: the bonus token of one is the root of the next."""
    number, n = steps.number, steps.tokens.lengths
    root = steps.tokens.values[steps.tokens.starts]
    same_chunk = steps.chunk[1:] == steps.chunk[:-1]
    same_prompt = (number[:-1] == 0) & (number[1:] == 0) & ~steps.has_bonus[:-1]
    next_step = (number[1:] == number[:-1] + 1) & steps.has_bonus[:-1] & (steps.bonus[:-1] == root[1:])
    contiguous = steps.position[1:] == steps.position[:-1] + n[:-1]
    bad = np.zeros(len(steps), np.bool_)
    bad[1:] = same_chunk & ~((same_prompt | next_step) & contiguous)

    def detail(row: int) -> str:
        before = row - 1
        bonus = steps.bonus[before] if steps.has_bonus[before] else None
        return (
            f"verify step {number[row]} at position {steps.position[row]} with root {root[row]} does not follow verify "
            f"step {number[before]} at position {steps.position[before]} with {n[before]} tokens and bonus {bonus}"
        )

    return RowCheck(bad, "contradiction", detail)
