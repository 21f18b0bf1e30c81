"""The decoder of the trace record (``schemas.trace.record``).

``open_chunk`` checks the bytes and the envelope of one chunk and leaves its rows in Arrow columns.
``VerifyStepColumns`` concatenates the rows of many chunks into numpy arrays, and ``find_malformed`` validates them:
each check is one expression over all rows, and a message is formatted only for a failed row. ``decode`` returns one
chunk as ``VerifyStep`` objects, for readers of single steps.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from schemas.trace.ipc_sizes import declared_bytes
from schemas.trace.record import (
    ADDED_COLUMNS,
    CHECKSUM_BYTES,
    ENVELOPE_JSON,
    FORMAT,
    ROOT,
    SCHEMA,
    Chunk,
    Envelope,
    TraceError,
    VerifyStep,
    checksum,
)

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

MAX_CHUNK_BYTES = 256 << 20
"""Size of a chunk after decompression. A node cuts chunks by their size before compression, at
``kafka.max_message_bytes``."""
_LENGTH_BOUND = 2**31
"""Replaces larger numbers of an envelope; no list is as long."""
_NO_VALUE = -2
"""Neither a token nor a node."""
_SINGLE_THREADED = pa.ipc.IpcReadOptions(use_threads=False)
_NO_ROWS = pa.RecordBatch.from_arrays([pa.array([], f.type) for f in SCHEMA], schema=SCHEMA)


@dataclass(frozen=True, slots=True)
class OpenedChunk:
    """A chunk with intact bytes and a valid envelope; its rows are not validated."""

    envelope: Envelope
    rows: pa.RecordBatch
    """Columns of ``SCHEMA``."""


def open_chunk(value: bytes) -> OpenedChunk:
    """Return a chunk with its rows in Arrow columns.

    Raises:
        TraceError: the bytes were truncated or altered, have another format, are too large when decompressed, or the
            envelope is invalid.
    """
    if len(value) <= CHECKSUM_BYTES:
        raise TraceError("truncated", f"{len(value)} bytes are too few for a trace chunk")
    stream = pa.py_buffer(value).slice(0, len(value) - CHECKSUM_BYTES)
    if checksum(stream) != value[-CHECKSUM_BYTES:]:
        raise TraceError("corrupt", f"checksum mismatch: the {len(value)} bytes were truncated or altered")
    try:
        if (size := declared_bytes(stream)) > MAX_CHUNK_BYTES:
            raise TraceError("too_large", f"{len(value)} bytes become {size} when decompressed, over {MAX_CHUNK_BYTES}")
        with pa.ipc.open_stream(stream, options=_SINGLE_THREADED) as reader:
            schema, batches = reader.schema, list(reader)
        for batch in batches:
            batch.validate(full=True)
    except (pa.ArrowInvalid, OSError, struct.error) as error:
        raise TraceError("not_arrow", f"not an Arrow stream: {error}") from error
    metadata = schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode():
        raise TraceError("foreign_format", f"expected format {FORMAT!r}, found {metadata.get(b'format')!r}")
    rows = _select_columns(schema, batches)
    chunk = OpenedChunk(_parse_envelope(metadata.get(b"envelope", b"")), rows)
    _check_features(chunk)
    return chunk


def decode(value: bytes) -> Chunk:
    """Return a chunk with its verify steps as objects.

    Raises:
        TraceError: the bytes were truncated or altered, have another format, or are inconsistent.
    """
    chunk = open_chunk(value)
    columns = VerifyStepColumns([chunk])
    for error in find_malformed(columns).values():
        raise error
    return Chunk(chunk.envelope, tuple(_to_objects(columns)))


def mismatched_columns(schema: pa.Schema) -> list[str]:
    """Return the columns of ``SCHEMA`` that a schema lacks or has in another type. It may lack ``ADDED_COLUMNS``.

    The schema's own names are never read: in a foreign record they may not be text.
    """

    def matches(field: pa.Field) -> bool:
        if schema.get_field_index(field.name) < 0:
            return field.name in ADDED_COLUMNS
        return bool(schema.field(field.name).type == field.type)

    return [field.name for field in SCHEMA if not matches(field)]


class ListColumn(NamedTuple):
    """A column of lists. The list of row i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: Array
    offsets: Ints

    @property
    def starts(self) -> Ints:
        """[rows] first index of each list."""
        return self.offsets[:-1]

    @property
    def lengths(self) -> Ints:
        """[rows] length of each list."""
        return np.diff(self.offsets)

    @property
    def entries(self) -> Array:
        """[entries] the values that belong to rows."""
        return self.values[self.offsets[0] : self.offsets[-1]]

    @property
    def entry_rows(self) -> Ints:
        """[entries] row of each entry."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    @property
    def entry_indices(self) -> Ints:
        """[entries] index of each entry in its list."""
        return concat_ranges(np.zeros(len(self.offsets) - 1, np.int64), self.lengths)

    def rows_with(self, flags: Bools) -> Bools:
        """Return [rows] whether any entry of a row is flagged; ``flags`` has one value per entry."""
        found = np.zeros(len(self.offsets) - 1, np.bool_)
        if flags.any():
            found[self.entry_rows[flags]] = True
        return found

    def row(self, index: int) -> list[Any]:
        """Return the list of one row."""
        found: list[Any] = self.values[self.offsets[index] : self.offsets[index + 1]].tolist()
        return found


def read_lists(column: pa.ListArray) -> ListColumn:
    """Return an Arrow column of lists; nulls in lists become 0."""
    values = column.values
    return ListColumn(
        (values.fill_null(0) if values.null_count else values).to_numpy(zero_copy_only=False),
        column.offsets.to_numpy().astype(np.int64),
    )


def concat_ranges(starts: Ints, lengths: Ints) -> Ints:
    """Return the concatenated ranges ``starts[i], starts[i] + 1, ..`` of the given lengths."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


class RowCheck(NamedTuple):
    """The result of one check over all rows."""

    failed: Bools
    """[rows]"""
    reason: str
    detail: Callable[[int], str]
    """Formats the message for a failed row."""


class VerifyStepColumns:
    """The rows of many chunks, concatenated in order.

    Attributes:
        envelopes: Envelopes of the chunks.
        batch: All rows, in the columns of ``SCHEMA``.
        bounds: [chunks + 1] first row of each chunk, then the number of rows.
        chunk: [rows] chunk of each row.
        has_sources: [rows] whether ``draft_sources`` is not null.
        feature_width, top_k: [rows] values of the envelope.
    """

    def __init__(self, chunks: Sequence[OpenedChunk]) -> None:
        self.envelopes = [chunk.envelope for chunk in chunks]
        batches = [chunk.rows for chunk in chunks]
        self.batch = pa.concat_batches(batches or [_NO_ROWS])
        sizes = np.array([batch.num_rows for batch in batches], dtype=np.int64)
        self.bounds: Ints = np.concatenate([[0], np.cumsum(sizes)])
        self.chunk: Ints = np.repeat(np.arange(len(chunks)), sizes)
        self.feature_width = self.per_row([min(e.feature_width, _LENGTH_BOUND) for e in self.envelopes])
        self.top_k = self.per_row([min(e.top_k, _LENGTH_BOUND) for e in self.envelopes])
        self.number, self.position, self.time = (self._ints(name) for name in ("verify_step", "position", "time"))
        self.active_since = self._ints("active_since")
        """[rows] 0 for null."""
        self.bonus = self._ints("bonus")
        self.has_bonus: Bools = _valid(self.batch.column("bonus"))
        self.tokens, self.accepted = self._lists("tokens"), self._lists("accepted")
        self.draft_tokens, self.draft_parents = self._lists("draft_tokens"), self._lists("draft_parents")
        self.draft_logprobs = self._lists("draft_logprobs")
        self.top_ids, self.top_logprobs = self._lists("top_ids"), self._lists("top_logprobs")
        self.draft_sources = self._lists("draft_sources")
        self.has_sources: Bools = _valid(self.batch.column("draft_sources"))
        column = self.batch.column("features")
        offsets = _buffer(column, 1, np.int64, column.offset, len(column) + 1)
        self.features = ListColumn(np.frombuffer(column.buffers()[2] or b"", np.uint8), offsets)
        """Bytes."""

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def per_row(self, per_chunk: Sequence[int]) -> Ints:
        """Return [rows] the value of each row's chunk."""
        return np.array(per_chunk, dtype=np.int64)[self.chunk]

    def first_errors(self, checks: Sequence[RowCheck]) -> dict[int, TraceError]:
        """Return the errors of the failed chunks by index: the first failed check of the first failed row."""
        failed = np.logical_or.reduce([check.failed for check in checks])
        if not failed.any():
            return {}
        rows = np.flatnonzero(failed)
        chunks, first = np.unique(self.chunk[rows], return_index=True)
        errors = {}
        for chunk, row in zip(chunks.tolist(), rows[first].tolist(), strict=True):
            check = next(check for check in checks if check.failed[row])
            errors[chunk] = TraceError(check.reason, check.detail(row))
        return errors

    def describe(self, row: int) -> str:
        """Return the name of a row in messages."""
        return f"verify step {self.batch.column('verify_step')[row].as_py()}"

    def _ints(self, name: str) -> Ints:
        column = self.batch.column(name)
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.int64())
        numbers = column.fill_null(0) if column.null_count else column
        return np.asarray(numbers.to_numpy(zero_copy_only=False), np.int64)

    def _lists(self, name: str) -> ListColumn:
        return read_lists(self.batch.column(name))


def find_malformed(steps: VerifyStepColumns) -> dict[int, TraceError]:
    """Return the errors of inconsistent chunks by index.

    The lengths of lists must match, parents must precede their children, accepted nodes must be a path from the root,
    and the committed tokens must be the accepted draft tokens.
    """
    return steps.first_errors([_check_nulls(steps), *_check_lengths(steps), *_check_links(steps)])


def _select_columns(schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1 and schema.equals(SCHEMA):
        return batches[0].replace_schema_metadata(None)
    if mismatched := mismatched_columns(schema):
        raise TraceError("foreign_schema", f"columns missing or of another type: {', '.join(mismatched)}")
    present = set(SCHEMA.names) - {name for name in ADDED_COLUMNS if schema.get_field_index(name) < 0}
    selected = [
        pa.RecordBatch.from_arrays(
            [b.column(f.name) if f.name in present else pa.nulls(b.num_rows, f.type) for f in SCHEMA], schema=SCHEMA
        )
        for b in batches
    ]
    return pa.concat_batches(selected or [_NO_ROWS])


def _parse_envelope(text: bytes) -> Envelope:
    try:
        return ENVELOPE_JSON.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "envelope"
        raise TraceError("bad_envelope", f"{field}: {first['msg']}") from error


def _check_features(chunk: OpenedChunk) -> None:
    """Check that claim and preceding tokens match the envelope's ``features``."""
    envelope = chunk.envelope
    if (envelope.claim is not None) != (envelope.features == "claim-check"):
        found = "no claim" if envelope.claim is None else f"a claim {envelope.claim.uri}"
        raise TraceError("contradiction", f"features {envelope.features}, but {found}")
    if not envelope.preceding_tokens:
        return
    preceding = len(envelope.preceding_tokens)
    position = chunk.rows.column("position")[0].as_py() if chunk.rows.num_rows else 0
    if envelope.features != "recompute" or preceding != position:
        detail = f"features {envelope.features}, {preceding} tokens before a chunk at position {position}"
        raise TraceError("contradiction", detail)


def _check_nulls(steps: VerifyStepColumns) -> RowCheck:
    def null_rows(name: str) -> Bools | None:
        column = steps.batch.column(name)
        rows = ~_valid(column) if column.null_count and not SCHEMA.field(name).nullable else None
        if pa.types.is_list(column.type) and column.values.null_count:
            lists = ListColumn(_valid(column.values), column.offsets.to_numpy().astype(np.int64))
            inside = lists.rows_with(~lists.entries)
            rows = inside if rows is None else rows | inside
        return rows

    nulls = {name: rows for name in SCHEMA.names if (rows := null_rows(name)) is not None}
    return RowCheck(
        np.logical_or.reduce([np.zeros(len(steps), np.bool_), *nulls.values()]),
        "contradiction",
        lambda row: f"{steps.describe(row)}: null in {', '.join(name for name, rows in nulls.items() if rows[row])}",
    )


def _check_lengths(steps: VerifyStepColumns) -> Iterator[RowCheck]:
    inline = np.array([e.features == "inline" for e in steps.envelopes], np.bool_)[steps.chunk]
    n, m = steps.tokens.lengths, steps.draft_tokens.lengths
    teacher = steps.has_bonus * (1 + m) * steps.top_k
    expected_lengths = {
        "features": n * inline * steps.feature_width * 2,
        "draft_parents": m,
        "draft_logprobs": m,
        "draft_sources": m * steps.has_sources,
        "top_ids": teacher,
        "top_logprobs": teacher,
    }

    def check(name: str, expected: Ints) -> RowCheck:
        found = getattr(steps, name).lengths
        return RowCheck(
            found != expected,
            "contradiction",
            lambda row: f"{steps.describe(row)}: {name} has {found[row]} entries, expected {expected[row]}",
        )

    yield from (check(name, expected) for name, expected in expected_lengths.items())
    yield RowCheck(n == 0, "contradiction", lambda row: f"{steps.describe(row)}: no committed token")


def _check_links(steps: VerifyStepColumns) -> Iterator[RowCheck]:
    """Check parents, accepted nodes and committed tokens; lengths may be wrong, so every lookup is guarded."""
    parents, accepted, drafts, tokens = steps.draft_parents, steps.accepted, steps.draft_tokens, steps.tokens
    yield RowCheck(
        parents.rows_with((parents.entries < ROOT) | (parents.entries >= parents.entry_indices)),
        "contradiction",
        lambda row: f"{steps.describe(row)}: a draft token must follow its parent: {parents.row(row)}",
    )

    rows, depth = accepted.entry_rows, accepted.entry_indices
    nodes = accepted.entries.astype(np.int64)
    exists = (nodes >= 0) & (nodes < np.minimum(parents.lengths, drafts.lengths)[rows])
    previous = np.where(depth == 0, ROOT, np.roll(nodes, 1))
    parent = _at(parents.values, parents.starts[rows] + nodes, exists)
    yield RowCheck(
        accepted.rows_with(~exists | (parent != previous)),
        "contradiction",
        lambda row: f"{steps.describe(row)}: accepted nodes {accepted.row(row)} are not a path from the root",
    )

    committed = _at(tokens.values, tokens.starts[rows] + 1 + depth, exists & (1 + depth < tokens.lengths[rows]))
    differs = accepted.rows_with(committed != _at(drafts.values, drafts.starts[rows] + nodes, exists))
    yield RowCheck(
        (steps.number > 0) & (differs | (tokens.lengths != 1 + accepted.lengths)),
        "contradiction",
        lambda row: f"{steps.describe(row)}: the committed tokens are not the accepted draft tokens",
    )


def _to_objects(steps: VerifyStepColumns) -> Iterator[VerifyStep]:
    """Return the valid rows of one chunk as objects."""
    (envelope,), batch = steps.envelopes, steps.batch
    k, verified = envelope.top_k, steps.has_bonus * (1 + steps.draft_tokens.lengths)
    versions, draft_us, verify_us = (batch.column(name).to_pylist() for name in ("speculator", "draft_us", "verify_us"))
    has_active = _valid(batch.column("active_since"))

    def values(lists: ListColumn, row: int) -> Array:
        return lists.values[lists.offsets[row] : lists.offsets[row + 1]]

    for row in range(len(steps)):
        yield VerifyStep(
            verify_step=int(steps.number[row]),
            position=int(steps.position[row]),
            tokens=tuple(steps.tokens.row(row)),
            features=values(steps.features, row).view("<u2").reshape(-1, envelope.feature_width),
            draft_tokens=tuple(steps.draft_tokens.row(row)),
            draft_parents=tuple(steps.draft_parents.row(row)),
            draft_logprobs=tuple(steps.draft_logprobs.row(row)),
            accepted=tuple(steps.accepted.row(row)),
            bonus=int(steps.bonus[row]) if steps.has_bonus[row] else None,
            top_ids=values(steps.top_ids, row).reshape(verified[row], k),
            top_logprobs=values(steps.top_logprobs, row).reshape(verified[row], k),
            speculator=versions[row],
            draft_us=draft_us[row],
            verify_us=verify_us[row],
            time_us=int(steps.time[row]),
            draft_sources=tuple(steps.draft_sources.row(row)) if steps.has_sources[row] else None,
            active_since_us=int(steps.active_since[row]) if has_active[row] else None,
        )


def _valid(column: pa.Array) -> Bools:
    if not column.null_count:
        return np.ones(len(column), np.bool_)
    return np.asarray(column.is_valid().to_numpy(zero_copy_only=False), np.bool_)


def _at(values: Array, index: Ints, exists: Bools) -> Array:
    """Return ``values[index]`` where the index exists, otherwise ``_NO_VALUE``."""
    if exists.all():
        return values[index]
    found = np.full(len(index), _NO_VALUE, np.int64)
    found[exists] = values[index[exists]]
    return found


def _buffer(column: pa.Array, number: int, dtype: type[np.generic], offset: int, length: int) -> Array:
    """Return a buffer of an Arrow array as a numpy array; the buffers of an empty array may be missing."""
    raw = column.buffers()[number]
    if raw is None or raw.size == 0:
        return np.zeros(length, dtype)
    return np.frombuffer(raw, dtype, length, offset * np.dtype(dtype).itemsize)
