"""From Kafka records to rows of the tables: no clock and no state, so that re-delivery rebuilds every byte.

All functions are pure, but for the files of claim checks, which are read through what the caller hands in: they never
change. A record either gives rows of ``accepted``, ``rejected`` and ``traces``, or one row of ``dead_letters`` with
everything it carried. ``schemas.trace`` says how tokens lie in rounds, ``schemas.batches`` what becomes of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from schemas import trace
from schemas.batches import ACCEPTED, DEAD_LETTERS, REJECTED, TABLES, TRACES, day_of
from schemas.claims import ClaimStoreError
from schemas.reading import decode
from schemas.trace import Chunk, Claim, Envelope, Round, TraceError
from schemas.tree import rejected_branches

INT32_MAX = 2**31 - 1
BF16_EXPONENT = 0x7F80
"""A bf16 number with all of these bits set is infinite or not a number."""

LINE = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""Lines name folders of the tables: an empty name is a null there, and a long one no file system takes."""

Row = dict[str, Any]
Claimed = Callable[[Claim, int, int], trace.U16]
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


def no_claims(claim: Claim, _tokens: int, _width: int) -> trace.U16:
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


def build(records: Iterable[Record], context_tokens: int, claimed: Claimed = no_claims) -> Built:
    """Rows of every table for the given records, in their order.

    Args:
        records: Of any partitions.
        context_tokens: Tokens kept before the root of a rejected branch.
        claimed: Reads the features of claim checks.

    Raises:
        ClaimStoreError: the store of claim checks cannot say what a record became; nothing was decided.
    """
    tables: dict[str, list[pa.Table]] = {name: [] for name in ("dead_letters", "rejected", "traces", "accepted")}
    dead: dict[str, int] = {}
    for record in records:
        try:
            for name, rows in chunk_rows(record, context_tokens, claimed).items():
                tables[name].append(rows)
        except TraceError as error:
            reason, detail = error.reason, error.detail
        except ClaimStoreError:
            raise
        except Exception as error:  # noqa: BLE001 - what foreign bytes make a codec raise cannot be listed, and one record must never stop its partition
            reason, detail = "unreadable", f"{type(error).__name__}: {error}"
        else:
            continue
        tables["dead_letters"].append(dead_letter(record, reason, detail))
        dead[reason] = dead.get(reason, 0) + 1
    return Built({name: pa.concat_tables([TABLES[name].empty_table(), *parts]) for name, parts in tables.items()}, dead)


def chunk_rows(record: Record, context_tokens: int, claimed: Claimed) -> dict[str, pa.Table]:
    """Rows of ``accepted``, ``rejected`` and ``traces`` that one record gives.

    Raises:
        TraceError: the record cannot be used; its reason is the code for the dead letter.
        ClaimStoreError: its features cannot be reached.
    """
    if record.value is None:
        raise TraceError("empty", "a record without a value")
    _check_headers(record)
    chunk = _with_features(decode(record.value), claimed)
    _check(chunk, record.header("rows"))
    return {
        "accepted": _table(ACCEPTED, accepted_rows(record, chunk)),
        "rejected": _table(REJECTED, rejected_rows(record, chunk, context_tokens)),
        "traces": _table(TRACES, trace_rows(record, chunk)),
    }


def _with_features(chunk: Chunk, claimed: Claimed) -> Chunk:
    """The chunk as if its features had travelled in it."""
    claim = chunk.envelope.claim
    if claim is None or not chunk.rounds:
        return chunk
    ends = np.cumsum([len(r.tokens) for r in chunk.rounds])
    parts = np.split(claimed(claim, int(ends[-1]), chunk.envelope.feature_width), ends[:-1])
    rounds = tuple(replace(r, features=part) for r, part in zip(chunk.rounds, parts, strict=True))
    return replace(chunk, rounds=rounds)


def accepted_rows(record: Record, chunk: Chunk) -> Iterator[Row]:
    """The window of a chunk's committed tokens: one row, or none for a chunk without rounds.

    Where the features are to be recomputed, the window begins with the request.
    """
    if not chunk.rounds:
        return
    envelope, rounds = chunk.envelope, chunk.rounds
    nodes = [teacher_nodes(r) for r in rounds]
    known = [(r, [node for node in of_round if node is not None]) for r, of_round in zip(rounds, nodes, strict=True)]
    yield {
        **_lineage(record, chunk),
        "position": rounds[0].position - len(envelope.before),
        "tokens": [*envelope.before, *(token for r in rounds for token in r.tokens)],
        "next_token": rounds[-1].bonus,
        "features": b"".join(_bytes(r.features) for r in rounds),
        "feature_width": envelope.feature_width,
        "loss_mask": [False] * len(envelope.before) + [node is not None for of_round in nodes for node in of_round],
        "top_k": envelope.top_k,
        "teacher_ids": np.concatenate([r.top_ids[rows].ravel() for r, rows in known]),
        "teacher_logprobs": np.concatenate([r.top_logprobs[rows].ravel() for r, rows in known]),
    }


def rejected_rows(record: Record, chunk: Chunk, context_tokens: int) -> Iterator[Row]:
    """The rejected branches of a chunk, in the order of its rounds."""
    lineage = _lineage(record, chunk) if chunk.rounds else {}
    before = list(chunk.envelope.before)
    feature_before: bytes | None = None
    for r in chunk.rounds:
        root = r.tokens[0]
        for path in rejected_branches(r.draft_parents, r.accepted):
            teacher = [1 + node for node in path]
            yield {
                **lineage,
                "round": r.round,
                "root_position": r.position,
                "root_feature": feature_before,
                "context": [*before[-context_tokens:], root],
                "branch": [r.draft_tokens[node] for node in path],
                "accepted_prefix": len(set(path) & set(r.accepted)),
                "draft_logprobs": [r.draft_logprobs[node] for node in path],
                "top_k": chunk.envelope.top_k,
                "teacher_ids": r.top_ids[teacher].ravel(),
                "teacher_logprobs": r.top_logprobs[teacher].ravel(),
            }
        before = [*before, *r.tokens][-context_tokens:]
        feature_before = _bytes(r.features[-1]) if len(r.features) else None


def trace_rows(record: Record, chunk: Chunk) -> Iterator[Row]:
    """The rounds of a chunk without their features."""
    envelope = chunk.envelope
    of_chunk = {
        **_coordinates(record, envelope),
        "node": envelope.node,
        "last_chunk": envelope.last,
        "finish": envelope.finish,
        "temperature": envelope.temperature,
        "top_p": envelope.top_p,
        "sampling_top_k": envelope.sampling_top_k,
        "seed": envelope.seed,
        "top_k": envelope.top_k,
    }
    for r in chunk.rounds:
        yield {
            **of_chunk,
            "speculator": r.speculator,
            "time": r.time_us,
            "round": r.round,
            "position": r.position,
            "tokens": r.tokens,
            "draft_tokens": r.draft_tokens,
            "draft_parents": r.draft_parents,
            "draft_logprobs": r.draft_logprobs,
            "accepted": r.accepted,
            "bonus": r.bonus,
            "top_ids": r.top_ids.ravel(),
            "top_logprobs": r.top_logprobs.ravel(),
            "draft_us": r.draft_us,
            "verify_us": r.verify_us,
        }


def teacher_nodes(r: Round) -> list[int | None]:
    """For each committed token the row of ``top_ids`` that holds the target after it; None inside the prompt."""
    if r.round > 0:
        return [0, *(1 + node for node in r.accepted)]
    inside: list[int | None] = [None] * len(r.tokens)
    return inside if r.bonus is None else [*inside[:-1], 0]


def dead_letter(record: Record, reason: str, detail: str) -> pa.Table:
    """The row that keeps an unusable record byte for byte."""
    row = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "time": record.time_us,
        "day": day_of(record.time_us),
        "reason": reason,
        "detail": detail.encode(errors="backslashreplace").decode(),
        "rows": record.number("rows"),
        "key": record.key,
        "value": record.value,
        "headers": [{"name": name, "value": value} for name, value in record.headers],
    }
    return _table(DEAD_LETTERS, [row])


def _check_headers(record: Record) -> None:
    schema, content = record.header("schema"), record.header("content-type")
    if schema not in trace.readable():
        raise TraceError("foreign_schema", f"header schema is {schema!r}, this worker reads {sorted(trace.readable())}")
    if content != trace.CONTENT_TYPE:
        raise TraceError("foreign_content", f"header content-type is {content!r}, expected {trace.CONTENT_TYPE!r}")


def _check(chunk: Chunk, claimed: str | None) -> None:
    """What the codec cannot see in a single row, and what the tables cannot hold."""
    envelope, rounds = chunk.envelope, chunk.rounds
    if claimed != str(len(rounds)):
        raise TraceError("wrong_count", f"header rows is {claimed!r}, the chunk has {len(rounds)} rounds")
    if not LINE.fullmatch(envelope.line):
        raise TraceError("bad_line", f"line is {envelope.line[:200]!r}, expected {LINE.pattern}")
    numbers = ("chunk", "feature_width", "top_k", "sampling_top_k")
    too_large = [name for name in numbers if getattr(envelope, name) > INT32_MAX]
    if envelope.seed is not None and not -(2**63) <= envelope.seed < 2**63:
        too_large.append("seed")
    if too_large:
        raise TraceError("too_large", f"does not fit into its column: {', '.join(too_large)}")
    if not (math.isfinite(envelope.temperature) and math.isfinite(envelope.top_p)):
        raise TraceError("bad_number", f"temperature {envelope.temperature}, top_p {envelope.top_p}")
    for r in rounds:
        _check_round(r)
    for one, after in pairwise(rounds):
        _check_order(one, after)


def _check_round(r: Round) -> None:
    where = f"round {r.round}"
    if r.round < 0 or r.position < 0:
        raise TraceError("contradiction", f"{where} at position {r.position}")
    if r.round == 0 and r.draft_tokens:
        raise TraceError("contradiction", f"{where}: the prompt has no draft, found {len(r.draft_tokens)} tokens")
    if r.round > 0 and r.bonus is None:
        raise TraceError("contradiction", f"{where}: no bonus, although only the inside of a prompt has none")
    if min(*r.tokens, *r.draft_tokens, r.bonus or 0, int(r.top_ids.min(initial=0))) < 0:
        raise TraceError("bad_token", f"{where}: negative token id")
    if ((r.features & BF16_EXPONENT) == BF16_EXPONENT).any():
        raise TraceError("bad_number", f"{where}: a feature is infinite or not a number")
    if not (np.isfinite(r.draft_logprobs).all() and np.isfinite(r.top_logprobs).all()):
        raise TraceError("bad_number", f"{where}: a log-probability is infinite or not a number")


def _check_order(one: Round, after: Round) -> None:
    """Rounds of a chunk follow each other: the token that one chose is the first that the next one consumed."""
    same_prompt = one.round == after.round == 0 and one.bonus is None
    next_round = after.round == one.round + 1 and one.bonus == after.tokens[0]
    if not (same_prompt or next_round) or after.position != one.position + len(one.tokens):
        raise TraceError(
            "contradiction",
            f"round {after.round} at position {after.position} with root {after.tokens[0]} does not follow round "
            f"{one.round} at position {one.position} with {len(one.tokens)} tokens and bonus {one.bonus}",
        )


def _lineage(record: Record, chunk: Chunk) -> Row:
    drafting = [r.speculator for r in chunk.rounds if r.speculator]
    return {
        **_coordinates(record, chunk.envelope),
        "speculator": drafting[-1] if drafting else "",
        "time": chunk.rounds[-1].time_us,
    }


def _coordinates(record: Record, envelope: Envelope) -> Row:
    return {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "request": envelope.request,
        "chunk": envelope.chunk,
        "target": envelope.target,
        "line": envelope.line,
        "label": envelope.label,
        "day": day_of(record.time_us),
    }


def _bytes(features: trace.U16) -> bytes:
    return features.astype("<u2", copy=False).tobytes()


def _table(schema: pa.Schema, rows: Iterable[Row]) -> pa.Table:
    listed: Sequence[Row] = list(rows)
    if not listed:
        return schema.empty_table()
    return pa.table([pa.array([row[f.name] for row in listed], type=f.type) for f in schema], schema=schema)
