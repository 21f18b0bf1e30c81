"""Builds table rows from Kafka records, with no clock and no state: a redelivery rebuilds every byte.

A record becomes either rows of ``accepted``, ``rejected`` and ``traces``, or one row of ``dead_letters`` that keeps
everything it carried. ``pipeline.dead_letters.reasons`` lists the reasons. The steps:

1. Open each record: check its headers, bytes and envelope.
2. Split the records into runs of about ``RUN_BYTES``. The verify steps of a run are checked and built in columns.
3. Reject chunks that contradict themselves, read the features of claim checks, and reject chunks with invalid values.
4. Reject records that repeat a written record.
5. Build the columns of the tables (``pipeline.columns``).

All functions are pure, except that they read the files of claim checks through a function of the caller; these files
never change. The result for a record does not depend on the other records, unless it repeats one of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.columns import build_tables, gather_features
from pipeline.dead_letters.reasons import DUPLICATE, UNREADABLE
from pipeline.deduplication import NO_DEDUPLICATION, ChunkIdentity, DeduplicationWindow, WrittenRecord
from pipeline.offsets import SourcePartition
from pipeline.validation import check_envelope, check_headers, find_invalid
from schemas.batches import ACCEPTED, DEAD_LETTERS, TABLES, TRACES, day_of
from schemas.claim_store import ClaimStoreError
from schemas.trace.decoder import ListColumn, OpenedChunk, VerifyStepColumns, find_malformed, open_chunk
from schemas.trace.record import U16, Claim, TraceError

RUN_BYTES = 32 << 20
"""Rows are built for chunks of about this size at a time."""

ClaimReader = Callable[[Claim, int, int], U16]
"""Returns the features [tokens, width] of a claim check."""

_ENVELOPE_COLUMNS = (
    "request", "chunk", "node", "target", "line", "label", "feature_width", "top_k",
    "finish", "temperature", "top_p", "sampling_top_k", "seed", "prompt_key",
)  # fmt: skip
"""Columns that are fields of the envelope."""
_TYPES = {f.name: f.type for schema in (ACCEPTED, TRACES) for f in schema}


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record as it was delivered."""

    topic: str
    partition: int
    offset: int
    time_us: int
    """Timestamp of the broker or the producer, in Unix microseconds."""
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    """Bytes of a name that are not UTF-8 are lone surrogates (``os.fsdecode``)."""

    def header(self, name: str) -> str | None:
        """Return the text of a header, the last one of that name; None if it is missing."""
        values = [value for key, value in self.headers if key == name and value is not None]
        return values[-1].decode(errors="replace") if values else None

    def number(self, name: str) -> int | None:
        """Return the count in a header; None if it is missing or not a count."""
        text = self.header(name) or ""
        return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None

    @property
    def size(self) -> int:
        """Bytes that the record takes in memory, with the file of its claim check."""
        return len(self.value or b"") + (self.number("claim-bytes") or 0)


@dataclass(frozen=True, slots=True)
class BuiltBatch:
    """Rows of every table, built from some records."""

    rows: Mapping[str, pa.Table]
    dead_letters: Mapping[str, int]
    """Number of dead letters by reason."""
    written: tuple[WrittenRecord, ...]
    """Records with rows in ``traces``, to be added to the deduplication window once they are committed."""
    chunk_gaps: int
    """Chunks without the chunk before them: it was dropped, became a dead letter, or left the deduplication window."""


def reject_claims(claim: Claim, _tokens: int, _width: int) -> U16:
    """Reject every claim check, for a reader without a claim store.

    Raises:
        TraceError: always.
    """
    raise TraceError("claim_foreign", f"{claim.uri}: this reader has no claim store")


def build(
    records: Iterable[Record],
    context_tokens: int,
    read_claim: ClaimReader = reject_claims,
    window: DeduplicationWindow = NO_DEDUPLICATION,
) -> BuiltBatch:
    """Build the rows of every table for the given records, in their order.

    Args:
        records: Records of any partitions.
        context_tokens: Tokens kept before the root of a rejected branch.
        read_claim: Reads the features of claim checks.
        window: Written records, which these records must not repeat. By default duplicates are not detected.

    Raises:
        ClaimStoreError: the claim store is unreachable. Nothing was decided.
    """
    delivered = tuple(records)
    builder = _Builder(context_tokens, read_claim, window)
    for run in _split_into_runs(builder.open(delivered)):
        builder.add(run)
    rejected = builder.rejected
    dead_letters = [_build_dead_letter(delivered[index], rejected[index]) for index in sorted(rejected)]
    rows = {"dead_letters": pa.Table.from_pylist(dead_letters, schema=DEAD_LETTERS)}
    for name in ("rejected", "traces", "accepted"):
        rows[name] = pa.concat_tables([TABLES[name].empty_table(), *(part[name] for part in builder.parts)])
    reasons = Counter(error.reason for error in rejected.values())
    return BuiltBatch(rows, reasons, tuple(builder.written), builder.chunk_gaps)


def build_unread(record: Record, crashes: int) -> BuiltBatch:
    """Build the dead letter of a record at which workers have ended, without opening it."""
    error = TraceError("crash", f"{crashes} workers ended at this record")
    rows = {name: schema.empty_table() for name, schema in TABLES.items()}
    rows["dead_letters"] = pa.Table.from_pylist([_build_dead_letter(record, error)], schema=DEAD_LETTERS)
    return BuiltBatch(rows, {error.reason: 1}, (), 0)


def identify(value: bytes | None) -> ChunkIdentity | None:
    """Return the identity of the chunk in the value of a record; None if it is no readable chunk."""
    try:
        chunk = open_chunk(value or b"")
        time_us = int(VerifyStepColumns([chunk]).time[-1])
    except Exception:  # noqa: BLE001 - foreign bytes make a codec raise anything
        return None
    envelope = chunk.envelope
    return ChunkIdentity(envelope.node, envelope.request, envelope.chunk, time_us)


@dataclass(frozen=True, slots=True)
class _OpenRecord:
    """A record with valid bytes and a valid envelope."""

    index: int
    """Index among the delivered records."""
    record: Record
    chunk: OpenedChunk


class _Builder:
    """Collects the results of the runs."""

    def __init__(self, context_tokens: int, read_claim: ClaimReader, window: DeduplicationWindow) -> None:
        self.rejected: dict[int, TraceError] = {}
        """By index among the delivered records."""
        self.written: list[WrittenRecord] = []
        self.chunk_gaps = 0
        self.parts: list[Mapping[str, pa.Table]] = []
        self._context_tokens = context_tokens
        self._read_claim = read_claim
        self._windows = (window, DeduplicationWindow(window.size))
        """Records written before, and records of the runs so far."""

    def open(self, delivered: Sequence[Record]) -> Iterator[_OpenRecord]:
        """Yield the records that have verify steps, and reject those with invalid headers, bytes or envelope."""
        for index, record in enumerate(delivered):
            try:
                chunk = _open(record)
            except Exception as error:  # noqa: BLE001 - foreign bytes make a codec raise anything, and one record must never stop its partition
                self.rejected[index] = _as_trace_error(error)
            else:
                if chunk.rows.num_rows:
                    yield _OpenRecord(index, record, chunk)

    def add(self, records: Sequence[_OpenRecord]) -> None:
        """Build the rows of records that follow those of the runs before."""
        run = _Run(records)
        try:
            run.read_features(self._read_claim)
            run.deduplicate(self._windows)
            rows = run.build_rows(self._context_tokens)
        except ClaimStoreError:
            raise
        except Exception as error:  # noqa: BLE001 - as above; the faulty record is found when each is built alone
            if len(records) == 1:
                self.rejected[records[0].index] = _as_trace_error(error)
            else:
                for record in records:
                    self.add([record])
            return
        self.rejected |= run.rejected
        self.written += run.written
        self.chunk_gaps += run.chunk_gaps
        self.parts += [rows] if rows else []
        self._windows[1].add(run.written)


class _Run:
    """Records whose rows are built together. A rejected record leaves the run."""

    def __init__(self, records: Sequence[_OpenRecord]) -> None:
        self.rejected: dict[int, TraceError] = {}
        """By index among the delivered records."""
        self.written: list[WrittenRecord] = []
        self.chunk_gaps = 0
        self._records = list(records)
        self._steps = VerifyStepColumns([record.chunk for record in records])
        self._claimed: dict[int, U16] = {}
        """Features of claim checks, by index among the delivered records."""

    def read_features(self, read_claim: ClaimReader) -> None:
        """Reject invalid chunks. The features of claim checks are read once the lengths of their chunks are valid."""
        self._reject(find_malformed(self._steps))
        faults = {}
        tokens = np.diff(self._steps.tokens.offsets[self._steps.bounds]).tolist()
        for number, record in enumerate(self._records):
            envelope = record.chunk.envelope
            if envelope.claim is None:
                continue
            try:
                self._claimed[record.index] = read_claim(envelope.claim, tokens[number], envelope.feature_width)
            except TraceError as error:
                faults[number] = error
        self._reject(faults)
        self._reject(find_invalid(self._steps, self._features()))

    def deduplicate(self, windows: Sequence[DeduplicationWindow]) -> None:
        """Reject records that repeat one in ``windows`` or in this run, and count chunks without the one before."""
        windows = (*windows, DeduplicationWindow(windows[0].size))
        duplicates = {}
        times = self._steps.time[self._steps.bounds[1:] - 1].tolist()
        for number, (opened, time_us) in enumerate(zip(self._records, times, strict=True)):
            record, envelope = opened.record, opened.chunk.envelope
            identity = ChunkIdentity(envelope.node, envelope.request, envelope.chunk, time_us)
            written = WrittenRecord(SourcePartition(record.topic, record.partition), record.offset, identity)
            first = next((at for window in windows if (at := window.find_duplicate(written)) is not None), None)
            if first is not None:
                duplicates[number] = TraceError(DUPLICATE, f"repeats the record at offset {first}")
                continue
            self.chunk_gaps += windows[0].size > 0 and not any(w.has_previous_chunk(written) for w in windows)
            self.written.append(written)
            windows[-1].add([written])
        self._reject(duplicates)

    def build_rows(self, context_tokens: int) -> dict[str, pa.Table] | None:
        """Build the rows of the remaining records; None without any."""
        if not self._records:
            return None
        return build_tables(self._steps, self._features(), _build_chunk_columns(self._records), context_tokens)

    def _reject(self, faults: Mapping[int, TraceError]) -> None:
        """Remove records from the run, by their position in it."""
        if not faults:
            return
        self.rejected |= {self._records[number].index: error for number, error in faults.items()}
        self._records = [record for number, record in enumerate(self._records) if number not in faults]
        self._steps = VerifyStepColumns([record.chunk for record in self._records])

    def _features(self) -> ListColumn:
        """Return the features of every verify step, inline or from claim checks."""
        claimed = {
            number: self._claimed[record.index]
            for number, record in enumerate(self._records)
            if record.index in self._claimed
        }
        return gather_features(self._steps, claimed)


def _open(record: Record) -> OpenedChunk:
    """Open the chunk of a record. Its rows are not checked yet.

    Raises:
        TraceError: headers, bytes or envelope are invalid.
    """
    if record.value is None:
        raise TraceError("empty", "a record without a value")
    for name, _ in record.headers:
        if (text := escape_name(name)) != name:
            raise TraceError("bad_header", f"the name {text[:200]!r} of a header is not UTF-8")
    check_headers(record.header)
    chunk = open_chunk(record.value)
    check_envelope(chunk, record.header)
    return chunk


def escape_name(name: str) -> str:
    r"""Return the name of a header with ``\\xff`` for each byte that is not UTF-8 (``transport.CommittedApp``)."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _split_into_runs(records: Iterable[_OpenRecord]) -> Iterator[list[_OpenRecord]]:
    run: list[_OpenRecord] = []
    size = 0
    for record in records:
        run.append(record)
        claim = record.chunk.envelope.claim
        size += record.chunk.rows.get_total_buffer_size() + (claim.size if claim else 0)
        if size >= RUN_BYTES:
            yield run
            run, size = [], 0
    if run:
        yield run


def _build_chunk_columns(opened: Sequence[_OpenRecord]) -> dict[str, pa.Array]:
    """Return the columns with one value for each chunk: where its record was, and its envelope."""
    records = [one.record for one in opened]
    envelopes = [one.chunk.envelope for one in opened]
    columns = {
        "topic": [record.topic for record in records],
        "partition": [record.partition for record in records],
        "offset": [record.offset for record in records],
        "day": [day_of(record.time_us) for record in records],
        "last_chunk": [envelope.last for envelope in envelopes],
        "start_time": [envelope.start_us for envelope in envelopes],
        **{name: [getattr(envelope, name) for envelope in envelopes] for name in _ENVELOPE_COLUMNS},
    }
    return {name: pa.array(values, _TYPES[name]) for name, values in columns.items()}


def _as_trace_error(error: Exception) -> TraceError:
    return error if isinstance(error, TraceError) else TraceError(UNREADABLE, f"{type(error).__name__}: {error}")


def _build_dead_letter(record: Record, error: TraceError) -> dict[str, object]:
    """Build the row that keeps an unusable record byte for byte."""
    return {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "time": record.time_us,
        "day": day_of(record.time_us),
        "reason": error.reason,
        "detail": error.detail.encode(errors="backslashreplace").decode(),
        "rows": record.number("rows"),
        "size": None if record.value is None else len(record.value),
        "key": record.key,
        "value": record.value,
        "headers": [{"name": escape_name(name), "value": value} for name, value in record.headers],
    }
