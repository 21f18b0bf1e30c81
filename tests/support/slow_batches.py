"""A slow reference of ``schemas.trace.decoder`` and ``pipeline.batches`` that builds one verify step at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.batches import ClaimReader, Record, reject_claims
from pipeline.validation import LINE
from schemas.batches import TABLES, day_of
from schemas.draft_tree import rejected_branches
from schemas.trace import record as trace
from schemas.trace.decoder import open_chunk
from schemas.trace.record import INT32_MAX, ROOT, TIME_END_US, Chunk, Envelope, TraceError, VerifyStep

BF16_EXPONENT = 0x7F80
"""A bf16 number with all of these bits set is infinite or NaN."""

Row = dict[str, Any]


def decode(value: bytes) -> Chunk:
    """Decode a chunk row by row."""
    opened = open_chunk(value)
    return Chunk(opened.envelope, tuple(_verify_steps(opened.rows, opened.envelope)))


def build(
    records: Iterable[Record], context_tokens: int, claimed: ClaimReader = reject_claims, window: int = 0
) -> dict[str, pa.Table]:
    """Build the rows of every table. A duplicate repeats a record of the ``window`` offsets before it."""
    rows: dict[str, list[Row]] = {name: [] for name in ("dead_letters", "rejected", "traces", "accepted")}
    seen: dict[object, list[int]] = {}
    for record in records:
        try:
            chunk = _read_valid_chunk(record, claimed)
            if chunk.verify_steps:
                _check_duplicate(record, chunk, seen, window)
        except TraceError as error:
            rows["dead_letters"].append(_build_dead_letter(record, error.reason, error.detail))
            continue
        rows["accepted"] += accepted_rows(record, chunk)
        rows["rejected"] += rejected_rows(record, chunk, context_tokens)
        rows["traces"] += trace_rows(record, chunk)
    return {name: _table(TABLES[name], of_table) for name, of_table in rows.items()}


def _read_valid_chunk(record: Record, claimed: ClaimReader) -> Chunk:
    if record.value is None:
        raise TraceError("empty", "a record without a value")
    _check_headers(record)
    opened = open_chunk(record.value)
    _check_envelope(record, opened.envelope, opened.rows.num_rows)
    chunk = _with_features(Chunk(opened.envelope, tuple(_verify_steps(opened.rows, opened.envelope))), claimed)
    for r in chunk.verify_steps:
        _check_verify_step(r, chunk.envelope.vocab_size)
    for one, after in pairwise(chunk.verify_steps):
        _check_order(one, after)
    return chunk


def _check_duplicate(record: Record, chunk: Chunk, seen: dict[object, list[int]], window: int) -> None:
    envelope = chunk.envelope
    name = (
        record.topic,
        record.partition,
        envelope.node,
        envelope.request,
        envelope.chunk,
        chunk.verify_steps[-1].time_us,
    )
    for offset in reversed(seen.setdefault(name, [])):
        if record.offset - window <= offset < record.offset:
            raise TraceError("duplicate", f"repeats the record at offset {offset}")
    seen[name].append(record.offset)


def _with_features(chunk: Chunk, claimed: ClaimReader) -> Chunk:
    """Return the chunk with the features of its claim check."""
    claim = chunk.envelope.claim
    if claim is None or not chunk.verify_steps:
        return chunk
    ends = np.cumsum([len(r.tokens) for r in chunk.verify_steps])
    parts = np.split(claimed(claim, int(ends[-1]), chunk.envelope.feature_width), ends[:-1])
    verify_steps = tuple(replace(r, features=part) for r, part in zip(chunk.verify_steps, parts, strict=True))
    return replace(chunk, verify_steps=verify_steps)


def accepted_rows(record: Record, chunk: Chunk) -> Iterator[Row]:
    """Yield the sample of a chunk's committed tokens: one row, or none without verify steps or with dropped features.

    Where the features are to be recomputed, the window begins with the request.
    """
    if not chunk.verify_steps or chunk.envelope.features == "dropped":
        return
    envelope, verify_steps = chunk.envelope, chunk.verify_steps
    nodes = [teacher_nodes(r) for r in verify_steps]
    known = [
        (r, [node for node in of_verify_step if node is not None])
        for r, of_verify_step in zip(verify_steps, nodes, strict=True)
    ]
    yield {
        **_lineage(record, chunk),
        "position": verify_steps[0].position - len(envelope.preceding_tokens),
        "tokens": [*envelope.preceding_tokens, *(token for r in verify_steps for token in r.tokens)],
        "next_token": verify_steps[-1].bonus,
        "features": b"".join(_bytes(r.features) for r in verify_steps),
        "feature_width": envelope.feature_width,
        "loss_mask": [False] * len(envelope.preceding_tokens)
        + [node is not None for of_verify_step in nodes for node in of_verify_step],
        "top_k": envelope.top_k,
        "teacher_ids": np.concatenate([r.top_ids[rows].ravel() for r, rows in known]),
        "teacher_logprobs": np.concatenate([r.top_logprobs[rows].ravel() for r, rows in known]),
        "last_chunk": envelope.last,
        "temperature": envelope.temperature,
        "top_p": envelope.top_p,
        "sampling_top_k": envelope.sampling_top_k,
        "prompt_key": envelope.prompt_key,
    }


def rejected_rows(record: Record, chunk: Chunk, context_tokens: int) -> Iterator[Row]:
    """Yield the rejected branches of a chunk, in the order of its verify steps."""
    if not chunk.verify_steps or chunk.envelope.features == "dropped":
        return
    lineage = _lineage(record, chunk)
    before = list(chunk.envelope.preceding_tokens)
    for r in chunk.verify_steps:
        root = r.tokens[0]
        for path in rejected_branches(r.draft_parents, r.accepted):
            teacher = [1 + node for node in path]
            yield {
                **lineage,
                "verify_step": r.verify_step,
                "root_position": r.position,
                "context": [*(before[-context_tokens:] if context_tokens else []), root],
                "branch": [r.draft_tokens[node] for node in path],
                "accepted_prefix": len(set(path) & set(r.accepted)),
                "draft_logprobs": [r.draft_logprobs[node] for node in path],
                "top_k": chunk.envelope.top_k,
                "teacher_ids": r.top_ids[teacher].ravel(),
                "teacher_logprobs": r.top_logprobs[teacher].ravel(),
                "draft_sources": None if r.draft_sources is None else [r.draft_sources[node] for node in path],
            }
        before = [*before, *r.tokens]


def trace_rows(record: Record, chunk: Chunk) -> Iterator[Row]:
    """Yield the verify steps of a chunk without their features."""
    envelope = chunk.envelope
    of_chunk = {
        **_coordinates(record, envelope),
        "last_chunk": envelope.last,
        "finish": envelope.finish,
        "temperature": envelope.temperature,
        "top_p": envelope.top_p,
        "sampling_top_k": envelope.sampling_top_k,
        "seed": envelope.seed,
        "start_time": envelope.start_us,
        "top_k": envelope.top_k,
    }
    for r in chunk.verify_steps:
        yield {
            **of_chunk,
            "speculator": r.speculator,
            "time": r.time_us,
            "verify_step": r.verify_step,
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
            "draft_sources": r.draft_sources,
            "active_since": r.active_since_us,
        }


def teacher_nodes(r: VerifyStep) -> list[int | None]:
    """Return for each committed token the row of ``top_ids`` after it; None inside the prompt."""
    if r.verify_step > 0:
        return [0, *(1 + node for node in r.accepted)]
    inside: list[int | None] = [None] * len(r.tokens)
    return inside if r.bonus is None else [*inside[:-1], 0]


def _build_dead_letter(record: Record, reason: str, detail: str) -> Row:
    """Build the row that keeps an unusable record byte for byte."""
    return {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "time": record.time_us,
        "day": day_of(record.time_us),
        "reason": reason,
        "detail": detail.encode(errors="backslashreplace").decode(),
        "rows": record.number("rows"),
        "size": None if record.value is None else len(record.value),
        "key": record.key,
        "value": record.value,
        "headers": [{"name": name, "value": value} for name, value in record.headers],
    }


def _check_headers(record: Record) -> None:
    content = record.header("content-type")
    if content != trace.CONTENT_TYPE:
        raise TraceError("foreign_content", f"header content-type is {content!r}, expected {trace.CONTENT_TYPE!r}")


def _check_envelope(record: Record, envelope: Envelope, rows: int) -> None:
    claimed = record.header("rows")
    if claimed != str(rows):
        raise TraceError("wrong_count", f"header rows is {claimed!r}, the chunk has {rows} verify steps")
    for name, found in (("target", envelope.target), ("node", envelope.node)):
        if record.header(name) not in (None, found):
            raise TraceError(
                "header_mismatch", f"header {name} is {record.header(name)!r}, the envelope says {found!r}"
            )
    if not LINE.fullmatch(envelope.line):
        raise TraceError("bad_line", f"line is {envelope.line[:200]!r}, expected {LINE.pattern}")
    numbers = ("chunk", "feature_width", "top_k", "sampling_top_k", "vocab_size")
    too_large = [name for name in numbers if (getattr(envelope, name) or 0) > INT32_MAX]
    if envelope.seed is not None and not -(2**63) <= envelope.seed < 2**63:
        too_large.append("seed")
    if too_large:
        raise TraceError("too_large", f"does not fit into its column: {', '.join(too_large)}")
    if not (math.isfinite(envelope.temperature) and math.isfinite(envelope.top_p)):
        raise TraceError("bad_number", f"temperature {envelope.temperature}, top_p {envelope.top_p}")
    highest = max(envelope.preceding_tokens, default=0)
    if envelope.vocab_size is not None and highest >= envelope.vocab_size:
        raise TraceError(
            "bad_token", f"token id {highest} in preceding_tokens, the vocabulary ends at {envelope.vocab_size}"
        )


def _check_verify_step(r: VerifyStep, vocabulary: int | None) -> None:
    where = f"verify step {r.verify_step}"
    if r.verify_step < 0 or r.position < 0:
        raise TraceError("contradiction", f"{where} at position {r.position}")
    if r.verify_step == 0 and r.draft_tokens:
        raise TraceError("contradiction", f"{where}: the prompt has no draft, found {len(r.draft_tokens)} tokens")
    _check_times(r, where)
    if r.verify_step > 0 and r.bonus is None:
        raise TraceError("contradiction", f"{where}: no bonus token; only a part of the prompt has none")
    _check_sources(r, where)
    end = vocabulary or 2**31
    bonus = () if r.bonus is None else (r.bonus,)
    ids = {"tokens": r.tokens, "draft_tokens": r.draft_tokens, "top_ids": r.top_ids.ravel().tolist(), "bonus": bonus}
    for name, of_name in ids.items():
        for token in of_name:
            if not 0 <= token < end:
                raise TraceError("bad_token", f"{where}: token id {token} in {name}, expected 0 to {end - 1}")
    if ((r.features & BF16_EXPONENT) == BF16_EXPONENT).any():
        raise TraceError("bad_number", f"{where}: a feature is infinite or NaN")
    if np.isinf(r.draft_logprobs).any() or not np.isfinite(r.top_logprobs).all():
        raise TraceError("bad_number", f"{where}: a log-probability is infinite, or the target's is NaN")


def _check_times(r: VerifyStep, where: str) -> None:
    for name, time_us in (("time", r.time_us), ("active_since", r.active_since_us or 0)):
        if not 0 <= time_us < TIME_END_US:
            raise TraceError("bad_number", f"{where}: {name} {time_us} us, expected one before the year 10000")


def _check_sources(r: VerifyStep, where: str) -> None:
    if r.draft_sources is None:
        return
    sources = list(r.draft_sources)
    if any(source not in range(1, 8) for source in sources):
        raise TraceError("contradiction", f"{where}: draft sources {sources}, expected only [1, 2, 3, 4, 5, 6, 7]")
    if (r.speculator != "") != any(source in {1, 3, 5, 7} for source in sources):
        raise TraceError("contradiction", f"{where}: draft sources {sources}, but the speculator is {r.speculator!r}")


def _check_order(one: VerifyStep, after: VerifyStep) -> None:
    """Check that two verify steps follow each other: the bonus token of one is the root of the next."""
    same_prompt = one.verify_step == after.verify_step == 0 and one.bonus is None
    next_verify_step = after.verify_step == one.verify_step + 1 and one.bonus == after.tokens[0]
    if not (same_prompt or next_verify_step) or after.position != one.position + len(one.tokens):
        raise TraceError(
            "contradiction",
            f"verify step {after.verify_step} at position {after.position} with root {after.tokens[0]} does not follow "
            f"verify step "
            f"{one.verify_step} at position {one.position} with {len(one.tokens)} tokens and bonus {one.bonus}",
        )


def _lineage(record: Record, chunk: Chunk) -> Row:
    drafting = [r.speculator for r in chunk.verify_steps if r.speculator]
    return {
        **_coordinates(record, chunk.envelope),
        "speculator": drafting[-1] if drafting else "",
        "time": chunk.verify_steps[-1].time_us,
    }


def _coordinates(record: Record, envelope: Envelope) -> Row:
    return {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "request": envelope.request,
        "chunk": envelope.chunk,
        "node": envelope.node,
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


def _verify_steps(table: pa.RecordBatch, envelope: Envelope) -> Iterator[VerifyStep]:
    names = ("time", "active_since")
    times = [table.column(name).cast(pa.int64()).to_pylist() for name in names]
    for known, *at in zip(table.drop_columns(names).to_pylist(), *times, strict=True):
        row = known | dict(zip(names, at, strict=True))
        nulls = [name for name in trace.SCHEMA.names if not _may_be_null(name, row[name]) and _has_null(row[name])]
        if nulls:
            raise TraceError("contradiction", f"verify step {row['verify_step']}: null in {', '.join(nulls)}")
        yield _verify_step(row, envelope)


def _may_be_null(name: str, value: object) -> bool:
    return name in ("bonus", "active_since") or (name == "draft_sources" and value is None)


def _has_null(value: object) -> bool:
    return value is None or (isinstance(value, list) and None in value)


def _verify_step(row: dict[str, Any], envelope: Envelope) -> VerifyStep:
    """Decode one row, and check every length against the others."""
    n, m, k = len(row["tokens"]), len(row["draft_tokens"]), envelope.top_k
    verified = 0 if row["bonus"] is None else 1 + m
    parents, accepted = row["draft_parents"], row["accepted"]
    claims = {
        "features": (len(row["features"]), (n if envelope.features == "inline" else 0) * envelope.feature_width * 2),
        "draft_parents": (len(parents), m),
        "draft_logprobs": (len(row["draft_logprobs"]), m),
        "draft_sources": (len(row["draft_sources"] or ()), 0 if row["draft_sources"] is None else m),
        "top_ids": (len(row["top_ids"]), verified * k),
        "top_logprobs": (len(row["top_logprobs"]), verified * k),
    }
    for name, (found, wanted) in claims.items():
        if found != wanted:
            raise TraceError(
                "contradiction", f"verify step {row['verify_step']}: {name} has {found} entries, expected {wanted}"
            )
    if n == 0:
        raise TraceError("contradiction", f"verify step {row['verify_step']}: no committed token")
    if any(not ROOT <= parent < node for node, parent in enumerate(parents)):
        raise TraceError(
            "contradiction", f"verify step {row['verify_step']}: a draft token must follow its parent: {parents}"
        )
    if [parents[node] if 0 <= node < m else None for node in accepted] != [ROOT, *accepted][: len(accepted)]:
        raise TraceError(
            "contradiction", f"verify step {row['verify_step']}: accepted nodes {accepted} are not a path from the root"
        )
    if row["verify_step"] > 0 and row["tokens"][1:] != [row["draft_tokens"][node] for node in accepted]:
        raise TraceError(
            "contradiction", f"verify step {row['verify_step']}: the committed tokens are not the accepted draft tokens"
        )
    return VerifyStep(
        verify_step=row["verify_step"],
        position=row["position"],
        tokens=tuple(row["tokens"]),
        features=np.frombuffer(row["features"], dtype="<u2").reshape(-1, envelope.feature_width),
        draft_tokens=tuple(row["draft_tokens"]),
        draft_parents=tuple(parents),
        draft_logprobs=tuple(row["draft_logprobs"]),
        accepted=tuple(accepted),
        bonus=row["bonus"],
        top_ids=np.array(row["top_ids"], dtype=np.int32).reshape(verified, k),
        top_logprobs=np.array(row["top_logprobs"], dtype=np.float32).reshape(verified, k),
        speculator=row["speculator"],
        draft_us=row["draft_us"],
        verify_us=row["verify_us"],
        time_us=row["time"],
        draft_sources=None if row["draft_sources"] is None else tuple(row["draft_sources"]),
        active_since_us=row["active_since"],
    )
