"""From Kafka records to rows of the tables: no clock and no state, so that re-delivery rebuilds every byte.

All functions are pure, but for the files of claim checks, which are read through what the caller hands in: they never
change. A record either gives rows of ``accepted``, ``rejected`` and ``traces``, or one row of ``dead_letters`` with
everything it carried; ``pipeline.dead_letters.reasons`` lists why. Records are looked at one by one as far as bytes
and envelope go;
then many together, in columns. What a record becomes does not depend on its company, but for what it repeats.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipeline.columns import features_of, tables
from pipeline.dead_letters.reasons import DUPLICATE, UNREADABLE
from pipeline.deduplication import NOTHING, Identity, Known, Taken
from pipeline.offsets import Source
from pipeline.validation import check_announced, check_envelope, unsound
from schemas.batches import ACCEPTED, DEAD_LETTERS, TABLES, TRACES, day_of
from schemas.claim_store import ClaimStoreError
from schemas.trace.decoder import Lists, Opened, VerifySteps, malformed, open_chunk
from schemas.trace.record import U16, Claim, TraceError

RUN_BYTES = 32 << 20
"""Rows are built for chunks of about this size at a time."""

Claimed = Callable[[Claim, int, int], U16]
"""Gives the features [tokens, width] that a claim names."""


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record as it was delivered."""

    topic: str
    partition: int
    offset: int
    time_us: int
    """Broker's or producer's time stamp, Unix microseconds."""
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]

    def header(self, name: str) -> str | None:
        """Text of a header; of several with one name the last. None where it is missing."""
        values = [value for key, value in self.headers if key == name and value is not None]
        return values[-1].decode(errors="replace") if values else None

    def number(self, name: str) -> int | None:
        """A header that counts something; None where it is missing or no count."""
        text = self.header(name) or ""
        return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None

    @property
    def size(self) -> int:
        """Bytes that it brings into memory, with the file of its claim check."""
        return len(self.value or b"") + (self.number("claim-bytes") or 0)


def no_claims(claim: Claim, _tokens: int, _width: int) -> U16:
    """For readers without a store: a claim check is a dead letter.

    Raises:
        TraceError: always.
    """
    raise TraceError("claim_foreign", f"{claim.uri}: this reader has no store of claim checks")


@dataclass(frozen=True, slots=True)
class Built:
    """What records became."""

    rows: Mapping[str, pa.Table]
    dead: Mapping[str, int]
    """Dead letters by reason."""
    taken: tuple[Taken, ...]
    """Records that gave rows, for the caller to remember once they are committed."""
    gaps: int
    """Chunks of which the one before is not known: it was shed, became a dead letter, or was forgotten."""


def build(
    records: Iterable[Record], context_tokens: int, claimed: Claimed = no_claims, known: Known = NOTHING
) -> Built:
    """Rows of every table for the given records, in their order.

    Args:
        records: Of any partitions.
        context_tokens: Tokens kept before the root of a rejected branch.
        claimed: Reads the features of claim checks.
        known: What was taken before, which these records must not repeat; by default nothing repeats anything.

    Raises:
        ClaimStoreError: the store of claim checks cannot say what a record became; nothing was decided.
    """
    delivered = tuple(records)
    builder = _Builder(context_tokens, claimed, known)
    for run in _runs(builder.arrivals(delivered)):
        builder.take(run)
    refused = builder.made.refused
    letters = [_letter(delivered[at], refused[at]) for at in sorted(refused)]
    rows = {"dead_letters": pa.Table.from_pylist(letters, schema=DEAD_LETTERS)}
    for name in ("rejected", "traces", "accepted"):
        rows[name] = pa.concat_tables([TABLES[name].empty_table(), *(part[name] for part in builder.made.parts)])
    dead = Counter(error.reason for error in refused.values())
    return Built(rows, dead, tuple(builder.made.taken), builder.made.gaps)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A record of which bytes and envelope are sound."""

    at: int
    """Its number among the delivered."""
    record: Record
    chunk: Opened


@dataclass(slots=True)
class _Made:
    """What some records became."""

    refused: dict[int, TraceError] = field(default_factory=dict)
    """By number among the delivered."""
    taken: list[Taken] = field(default_factory=list)
    gaps: int = 0
    parts: list[Mapping[str, pa.Table]] = field(default_factory=list)

    def add(self, more: _Made) -> None:
        self.refused |= more.refused
        self.taken += more.taken
        self.gaps += more.gaps
        self.parts += more.parts


class _Builder:
    def __init__(self, context_tokens: int, claimed: Claimed, known: Known) -> None:
        self.made = _Made()
        self._context_tokens = context_tokens
        self._claimed = claimed
        self._known = (known, Known(known.window))
        """What was taken before, and in the runs until here."""

    def arrivals(self, delivered: Sequence[Record]) -> Iterator[_Arrival]:
        """The records with verify steps, as far as each can be judged without looking at them."""
        for at, record in enumerate(delivered):
            try:
                chunk = _open(record)
            except Exception as error:  # noqa: BLE001 - what foreign bytes make a codec raise cannot be listed, and one record must never stop its partition
                self.made.refused[at] = _refusal(error)
            else:
                if chunk.rows.num_rows:
                    yield _Arrival(at, record, chunk)

    def take(self, run: Sequence[_Arrival]) -> None:
        """Decide about records that follow those before, and build their rows."""
        try:
            made = self._rows(run)
        except ClaimStoreError:
            raise
        except Exception as error:  # noqa: BLE001 - as above; whose fault it is shows when each is alone
            if len(run) == 1:
                self.made.refused[run[0].at] = _refusal(error)
            else:
                for arrival in run:
                    self.take([arrival])
        else:
            self.made.add(made)
            self._known[1].add(made.taken)

    def _rows(self, run: Sequence[_Arrival]) -> _Made:
        sieve = _Sieve(run)
        sieve.refuse(malformed(sieve.verify_steps))
        sieve.fetch(self._claimed)
        sieve.refuse(unsound(sieve.verify_steps, sieve.features()))
        taken, gaps, repeated = self._news(sieve)
        sieve.refuse(repeated)
        parts: list[Mapping[str, pa.Table]] = []
        if sieve.arrivals:
            of_chunks = _of_chunks(sieve.arrivals)
            parts.append(tables(sieve.verify_steps, sieve.features(), of_chunks, self._context_tokens))
        return _Made(sieve.refused, taken, gaps, parts)

    def _news(self, sieve: _Sieve) -> tuple[list[Taken], int, dict[int, TraceError]]:
        """Sound records that repeat none, how many of them miss the one before, and those that repeat one."""
        known = (*self._known, Known(self._known[0].window))
        taken: list[Taken] = []
        gaps, repeated = 0, {}
        times = sieve.verify_steps.time[sieve.verify_steps.bounds[1:] - 1].tolist()
        for number, (arrival, time_us) in enumerate(zip(sieve.arrivals, times, strict=True)):
            record, envelope = arrival.record, arrival.chunk.envelope
            identity = Identity(envelope.node, envelope.request, envelope.chunk, time_us)
            one = Taken(Source(record.topic, record.partition), record.offset, identity)
            first = next((at for some in known if (at := some.repeats(one)) is not None), None)
            if first is not None:
                repeated[number] = TraceError(DUPLICATE, f"repeats the record at offset {first}")
                continue
            gaps += self._known[0].window > 0 and not any(some.follows(one) for some in known)
            taken.append(one)
            known[-1].add([one])
        return taken, gaps, repeated


class _Sieve:
    """Records of a run that nothing speaks against so far, with their verify steps."""

    def __init__(self, run: Sequence[_Arrival]) -> None:
        self.arrivals = list(run)
        self.verify_steps = VerifySteps([arrival.chunk for arrival in run])
        self.refused: dict[int, TraceError] = {}
        """By number among the delivered."""
        self._claimed: dict[int, U16] = {}

    def refuse(self, faults: Mapping[int, TraceError]) -> None:
        """Leave out records, told by their number in ``arrivals``."""
        if not faults:
            return
        self.refused |= {self.arrivals[number].at: error for number, error in faults.items()}
        self.arrivals = [arrival for number, arrival in enumerate(self.arrivals) if number not in faults]
        self.verify_steps = VerifySteps([arrival.chunk for arrival in self.arrivals])

    def fetch(self, claimed: Claimed) -> None:
        """Get the features that did not travel in their records."""
        faults = {}
        tokens = np.diff(self.verify_steps.tokens.offsets[self.verify_steps.bounds]).tolist()
        for number, arrival in enumerate(self.arrivals):
            envelope = arrival.chunk.envelope
            if envelope.claim is None:
                continue
            try:
                self._claimed[arrival.at] = claimed(envelope.claim, tokens[number], envelope.feature_width)
            except TraceError as error:
                faults[number] = error
        self.refuse(faults)

    def features(self) -> Lists:
        """The features of every verify step, however they travelled."""
        claimed = {
            number: self._claimed[arrival.at]
            for number, arrival in enumerate(self.arrivals)
            if arrival.at in self._claimed
        }
        return features_of(self.verify_steps, claimed)


def _open(record: Record) -> Opened:
    """The chunk of a record, of which the rows are not looked at yet.

    Raises:
        TraceError: it cannot be used.
    """
    if record.value is None:
        raise TraceError("empty", "a record without a value")
    check_announced(record.header)
    chunk = open_chunk(record.value)
    check_envelope(chunk, record.header)
    return chunk


def _runs(arrivals: Iterable[_Arrival]) -> Iterator[list[_Arrival]]:
    run: list[_Arrival] = []
    size = 0
    for arrival in arrivals:
        run.append(arrival)
        claim = arrival.chunk.envelope.claim
        size += arrival.chunk.rows.get_total_buffer_size() + (claim.size if claim else 0)
        if size >= RUN_BYTES:
            yield run
            run, size = [], 0
    if run:
        yield run


def _of_chunks(arrivals: Sequence[_Arrival]) -> dict[str, pa.Array]:
    """What the tables say of each chunk and its record, beside what its verify steps say."""
    records = [arrival.record for arrival in arrivals]
    envelopes = [arrival.chunk.envelope for arrival in arrivals]
    columns = {
        "topic": [record.topic for record in records],
        "partition": [record.partition for record in records],
        "offset": [record.offset for record in records],
        "day": [day_of(record.time_us) for record in records],
        "last_chunk": [envelope.last for envelope in envelopes],
        **{name: [getattr(envelope, name) for envelope in envelopes] for name in _AS_IN_ENVELOPE},
    }
    return {name: pa.array(values, _TYPES[name]) for name, values in columns.items()}


def _refusal(error: Exception) -> TraceError:
    return error if isinstance(error, TraceError) else TraceError(UNREADABLE, f"{type(error).__name__}: {error}")


def _letter(record: Record, error: TraceError) -> dict[str, object]:
    """The row that keeps an unusable record byte for byte."""
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
        "headers": [{"name": name, "value": value} for name, value in record.headers],
    }


_AS_IN_ENVELOPE = (
    "request", "chunk", "node", "target", "line", "label", "feature_width", "top_k",
    "finish", "temperature", "top_p", "sampling_top_k", "seed",
)  # fmt: skip
_TYPES = {f.name: f.type for schema in (ACCEPTED, TRACES) for f in schema}
