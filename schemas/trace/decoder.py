"""The reading side of ``schemas.trace.record``: from bytes to verify steps, those of many chunks at a time.

``open_chunk`` looks at the bytes and the envelope, and leaves the rows in their Arrow columns. ``VerifySteps`` lays
the rows
of chunks end to end as numpy arrays, and ``malformed`` says which of them contradict themselves: a check is one
expression over all rows, and a message is written only for a row that fails. ``decode`` gives one chunk as
``VerifyStep``
objects, for those who look at single verify steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from schemas.trace.record import (
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

_LONGER_THAN_ANY = 2**31
"""Stands for any larger number in an envelope: no list is as long."""
_PLAIN = pa.ipc.IpcReadOptions(use_threads=False)


@dataclass(frozen=True, slots=True)
class Opened:
    """A chunk whose bytes are whole and whose envelope is sound; its rows are not looked at yet."""

    envelope: Envelope
    rows: pa.RecordBatch
    """In the columns of ``SCHEMA``."""


def open_chunk(value: bytes) -> Opened:
    """The chunk that ``encode`` wrote, with its rows as they lie in it.

    Raises:
        TraceError: the bytes were cut or altered, are of another format, or have another envelope.
    """
    if len(value) <= CHECKSUM_BYTES:
        raise TraceError("truncated", f"{len(value)} bytes are too few for a trace chunk")
    stream = pa.py_buffer(value).slice(0, len(value) - CHECKSUM_BYTES)
    if checksum(stream) != value[-CHECKSUM_BYTES:]:
        raise TraceError("corrupt", f"checksum mismatch: the {len(value)} bytes were cut or altered on their way")
    try:
        with pa.ipc.open_stream(stream, options=_PLAIN) as reader:
            schema, batches = reader.schema, list(reader)
        for batch in batches:
            batch.validate(full=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise TraceError("not_arrow", f"not an Arrow stream: {error}") from error
    metadata = schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode():
        raise TraceError("foreign_format", f"expected format {FORMAT!r}, found {metadata.get(b'format')!r}")
    rows = _in_our_columns(schema, batches)
    opened = Opened(_envelope(metadata.get(b"envelope", b"")), rows)
    _check_way(opened)
    return opened


class Lists(NamedTuple):
    """A column of lists: those of row i are ``values[offsets[i]:offsets[i + 1]]``."""

    values: Array
    offsets: Ints

    @property
    def starts(self) -> Ints:
        """[rows] where each list begins."""
        return self.offsets[:-1]

    @property
    def lengths(self) -> Ints:
        """[rows]."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> Ints:
        """[entries] the row that each entry between the first and the last offset belongs to."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)

    @property
    def numbers(self) -> Ints:
        """[entries] how many stand before each in its row."""
        return spans(np.zeros(len(self.offsets) - 1, np.int64), self.lengths)

    @property
    def entries(self) -> Array:
        """The values that rows own."""
        return self.values[self.offsets[0] : self.offsets[-1]]

    def any(self, bad: Bools) -> Bools:
        """[rows] whether any entry of a row is bad; ``bad`` is for each of ``entries``."""
        found = np.zeros(len(self.offsets) - 1, np.bool_)
        if bad.any():
            found[self.rows[bad]] = True
        return found

    def of(self, row: int) -> list[Any]:
        """One list."""
        found: list[Any] = self.values[self.offsets[row] : self.offsets[row + 1]].tolist()
        return found


def spans(starts: Ints, lengths: Ints) -> Ints:
    """Indices of runs of entries, laid end to end: ``starts[0], starts[0] + 1, ..`` and so on for each run."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


class Check(NamedTuple):
    """A rule over all rows."""

    bad: Bools
    """[rows]."""
    reason: str
    detail: Callable[[int], str]
    """What is wrong with a row that breaks it."""


class VerifySteps:
    """The rows of chunks, end to end in their order.

    Attributes:
        envelopes: Of the chunks.
        batch: All rows, in the columns of ``SCHEMA``.
        bounds: [chunks + 1] first row of each chunk, and the number of rows.
        chunk: [rows] the chunk of each row.
        feature_width, top_k: [rows] as the envelope says.
    """

    def __init__(self, chunks: Sequence[Opened]) -> None:
        self.envelopes = [chunk.envelope for chunk in chunks]
        batches = [chunk.rows for chunk in chunks]
        self.batch = pa.concat_batches(batches or [_NO_ROWS])
        sizes = np.array([batch.num_rows for batch in batches], dtype=np.int64)
        self.bounds: Ints = np.concatenate([[0], np.cumsum(sizes)])
        self.chunk: Ints = np.repeat(np.arange(len(chunks)), sizes)
        self.feature_width = self.of_row([min(e.feature_width, _LONGER_THAN_ANY) for e in self.envelopes])
        self.top_k = self.of_row([min(e.top_k, _LONGER_THAN_ANY) for e in self.envelopes])
        self.number, self.position, self.time = (self._numbers(name) for name in ("verify_step", "position", "time"))
        self.bonus = self._numbers("bonus")
        self.has_bonus: Bools = _valid(self.batch.column("bonus"))
        self.tokens, self.accepted = self._lists("tokens"), self._lists("accepted")
        self.draft_tokens, self.draft_parents = self._lists("draft_tokens"), self._lists("draft_parents")
        self.draft_logprobs = self._lists("draft_logprobs")
        self.top_ids, self.top_logprobs = self._lists("top_ids"), self._lists("top_logprobs")
        column = self.batch.column("features")
        offsets = _buffer(column, 1, np.int64, column.offset, len(column) + 1)
        self.features = Lists(np.frombuffer(column.buffers()[2] or b"", np.uint8), offsets)
        """Bytes."""

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def of_row(self, of_chunk: Sequence[int]) -> Ints:
        """[rows] a number that the whole chunk has."""
        return np.array(of_chunk, dtype=np.int64)[self.chunk]

    def first_faults(self, checks: Sequence[Check]) -> dict[int, TraceError]:
        """For each chunk that has a bad row, the first rule that its first bad row breaks."""
        bad = np.logical_or.reduce([check.bad for check in checks])
        if not bad.any():
            return {}
        rows = np.flatnonzero(bad)
        chunks, first = np.unique(self.chunk[rows], return_index=True)
        found = {}
        for chunk, row in zip(chunks.tolist(), rows[first].tolist(), strict=True):
            check = next(check for check in checks if check.bad[row])
            found[chunk] = TraceError(check.reason, check.detail(row))
        return found

    def where(self, row: int) -> str:
        """What a message calls a row."""
        return f"verify step {self.batch.column('verify_step')[row].as_py()}"

    def _numbers(self, name: str) -> Ints:
        column = self.batch.column(name)
        if name == "time":
            column = column.cast(pa.int64())
        numbers = column.fill_null(0) if column.null_count else column
        return np.asarray(numbers.to_numpy(zero_copy_only=False), np.int64)

    def _lists(self, name: str) -> Lists:
        column = self.batch.column(name)
        values = column.values
        return Lists(
            (values.fill_null(0) if values.null_count else values).to_numpy(zero_copy_only=False),
            column.offsets.to_numpy().astype(np.int64),
        )


def malformed(verify_steps: VerifySteps) -> dict[int, TraceError]:
    """Why chunks contradict themselves, by their number; empty where all are sound.

    Every list is as long as the others ask, parents come before their children, accepted nodes are a path from the
    root, and what was committed is what was accepted.
    """
    return verify_steps.first_faults([_nulls(verify_steps), *_lengths(verify_steps), *_links(verify_steps)])


def decode(value: bytes) -> Chunk:
    """The chunk that ``encode`` wrote.

    Raises:
        TraceError: the bytes were cut or altered, are of another format, or contradict themselves.
    """
    opened = open_chunk(value)
    verify_steps = VerifySteps([opened])
    for fault in malformed(verify_steps).values():
        raise fault
    return Chunk(opened.envelope, tuple(_verify_steps(verify_steps)))


def foreign_columns(schema: pa.Schema) -> list[str]:
    """Our columns that a schema lacks or has in another type; its own names are not asked for, they may be no text."""
    return [f.name for f in SCHEMA if schema.get_field_index(f.name) < 0 or schema.field(f.name).type != f.type]


def _in_our_columns(schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1 and schema.equals(SCHEMA):
        return batches[0].replace_schema_metadata(None)
    if wrong := foreign_columns(schema):
        raise TraceError("foreign_schema", f"columns missing or of another type: {', '.join(wrong)}")
    ours = [pa.RecordBatch.from_arrays([b.column(name) for name in SCHEMA.names], schema=SCHEMA) for b in batches]
    return pa.concat_batches(ours or [_NO_ROWS])


def _envelope(text: bytes) -> Envelope:
    try:
        return ENVELOPE_JSON.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "envelope"
        raise TraceError("bad_envelope", f"{where}: {first['msg']}") from error


def _check_way(opened: Opened) -> None:
    """What the envelope says about features must fit to the way in which they travel."""
    envelope = opened.envelope
    if (envelope.claim is not None) != (envelope.features == "claim-check"):
        found = "no claim" if envelope.claim is None else f"a claim {envelope.claim.uri}"
        raise TraceError("contradiction", f"features {envelope.features}, but {found}")
    if not envelope.before:
        return
    begins = opened.rows.column("position")[0].as_py() if opened.rows.num_rows else 0
    if envelope.features != "recompute" or len(envelope.before) != begins:
        raise TraceError(
            "contradiction",
            f"features {envelope.features}, {len(envelope.before)} tokens before a chunk that begins at {begins}",
        )


def _nulls(verify_steps: VerifySteps) -> Check:
    def missing(name: str) -> Bools | None:
        column = verify_steps.batch.column(name)
        bad = ~_valid(column) if column.null_count and name != "bonus" else None
        if pa.types.is_list(column.type) and column.values.null_count:
            lists = Lists(_valid(column.values), column.offsets.to_numpy().astype(np.int64))
            inside = lists.any(~lists.entries)
            bad = inside if bad is None else bad | inside
        return bad

    found = {name: bad for name in SCHEMA.names if (bad := missing(name)) is not None}
    return Check(
        np.logical_or.reduce([np.zeros(len(verify_steps), np.bool_), *found.values()]),
        "contradiction",
        lambda row: f"{verify_steps.where(row)}: null in {', '.join(name for name, bad in found.items() if bad[row])}",
    )


def _lengths(verify_steps: VerifySteps) -> Iterator[Check]:
    inline = np.array([e.features == "inline" for e in verify_steps.envelopes], np.bool_)[verify_steps.chunk]
    n, m = verify_steps.tokens.lengths, verify_steps.draft_tokens.lengths
    known = verify_steps.has_bonus * (1 + m) * verify_steps.top_k
    wanted = {
        "features": n * inline * verify_steps.feature_width * 2,
        "draft_parents": m,
        "draft_logprobs": m,
        "top_ids": known,
        "top_logprobs": known,
    }

    def check(name: str, expected: Ints) -> Check:
        found = getattr(verify_steps, name).lengths
        return Check(
            found != expected,
            "contradiction",
            lambda row: f"{verify_steps.where(row)}: {name} has {found[row]} entries, expected {expected[row]}",
        )

    yield from (check(name, expected) for name, expected in wanted.items())
    yield Check(n == 0, "contradiction", lambda row: f"{verify_steps.where(row)}: no committed token")


def _links(verify_steps: VerifySteps) -> Iterator[Check]:
    """Parents, accepted nodes and committed tokens. Lengths may not fit either, so nothing is looked up blindly."""
    parents, accepted, drafts, tokens = (
        verify_steps.draft_parents,
        verify_steps.accepted,
        verify_steps.draft_tokens,
        verify_steps.tokens,
    )
    of_accepted, node = accepted.rows, parents.numbers
    stray = parents.any((parents.entries < ROOT) | (parents.entries >= node))
    yield Check(
        stray,
        "contradiction",
        lambda row: f"{verify_steps.where(row)}: a drafted node must follow its parent: {parents.of(row)}",
    )

    chosen = accepted.entries.astype(np.int64)
    drafted = (chosen >= 0) & (chosen < np.minimum(parents.lengths, drafts.lengths)[of_accepted])
    step = accepted.numbers
    before = np.where(step == 0, ROOT, np.roll(chosen, 1))
    parent = _at(parents.values, parents.starts[of_accepted] + chosen, drafted)
    yield Check(
        accepted.any(~drafted | (parent != before)),
        "contradiction",
        lambda row: f"{verify_steps.where(row)}: accepted nodes {accepted.of(row)} are no path from the root",
    )

    after_prompt = verify_steps.number > 0
    there = drafted & (1 + step < tokens.lengths[of_accepted])
    kept = _at(tokens.values, tokens.starts[of_accepted] + 1 + step, there)
    differs = accepted.any(kept != _at(drafts.values, drafts.starts[of_accepted] + chosen, drafted))
    yield Check(
        after_prompt & (differs | (tokens.lengths != 1 + accepted.lengths)),
        "contradiction",
        lambda row: f"{verify_steps.where(row)}: the committed tokens are not the accepted drafts",
    )


def _verify_steps(verify_steps: VerifySteps) -> Iterator[VerifyStep]:
    """Sound rows of one chunk."""
    (envelope,), batch = verify_steps.envelopes, verify_steps.batch
    k, verified = envelope.top_k, verify_steps.has_bonus * (1 + verify_steps.draft_tokens.lengths)
    versions, draft_us, verify_us = (batch.column(name).to_pylist() for name in ("speculator", "draft_us", "verify_us"))
    for row in range(len(verify_steps)):
        features = verify_steps.features.values[
            verify_steps.features.offsets[row] : verify_steps.features.offsets[row + 1]
        ]
        top = slice(verify_steps.top_ids.offsets[row], verify_steps.top_ids.offsets[row + 1])
        top_logprobs = slice(verify_steps.top_logprobs.offsets[row], verify_steps.top_logprobs.offsets[row + 1])
        yield VerifyStep(
            verify_step=int(verify_steps.number[row]),
            position=int(verify_steps.position[row]),
            tokens=tuple(verify_steps.tokens.of(row)),
            features=features.view("<u2").reshape(-1, envelope.feature_width),
            draft_tokens=tuple(verify_steps.draft_tokens.of(row)),
            draft_parents=tuple(verify_steps.draft_parents.of(row)),
            draft_logprobs=tuple(verify_steps.draft_logprobs.of(row)),
            accepted=tuple(verify_steps.accepted.of(row)),
            bonus=int(verify_steps.bonus[row]) if verify_steps.has_bonus[row] else None,
            top_ids=verify_steps.top_ids.values[top].reshape(verified[row], k),
            top_logprobs=verify_steps.top_logprobs.values[top_logprobs].reshape(verified[row], k),
            speculator=versions[row],
            draft_us=draft_us[row],
            verify_us=verify_us[row],
            time_us=int(verify_steps.time[row]),
        )


def _valid(column: pa.Array) -> Bools:
    if not column.null_count:
        return np.ones(len(column), np.bool_)
    return np.asarray(column.is_valid().to_numpy(zero_copy_only=False), np.bool_)


def _at(values: Array, index: Ints, there: Bools) -> Array:
    """``values[index]``; -2, which is no token and no node, where there is none."""
    if there.all():
        return values[index]
    found = np.full(len(index), -2, np.int64)
    found[there] = values[index[there]]
    return found


def _buffer(column: pa.Array, number: int, dtype: type[np.generic], offset: int, length: int) -> Array:
    """A buffer of an array as numpy sees it; an array without rows may have none."""
    raw = column.buffers()[number]
    if raw is None or raw.size == 0:
        return np.zeros(length, dtype)
    return np.frombuffer(raw, dtype, length, offset * np.dtype(dtype).itemsize)


_NO_ROWS = pa.RecordBatch.from_arrays([pa.array([], f.type) for f in SCHEMA], schema=SCHEMA)
