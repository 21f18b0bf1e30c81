"""Compares ``batches.build`` with a slow reference that builds row by row: rows and dead letters, word for word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import slow_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batches import Record, build
from pipeline.deduplication import DeduplicationWindow
from schemas.draft_tree import chain
from schemas.trace import record as trace
from schemas.trace.decoder import decode
from schemas.trace.record import (
    ROOT,
    SCHEMA,
    U16,
    Chunk,
    Claim,
    DraftSource,
    Envelope,
    Features,
    TraceError,
    VerifyStep,
    encode,
)
from serving.traces.chunks import drop_features

CONTEXT = 4
Rng = np.random.Generator


@dataclass(frozen=True)
class Shape:
    """Shape of a generated chunk."""

    seed: int
    verify_steps: int
    prompt_parts: int
    """Rows of verify step 0. Without any, the chunk begins inside a request."""
    drafted: int
    """Maximum number of draft tokens."""
    trees: bool
    way: Features
    width: int
    top_k: int
    vocabulary: int | None


shapes = st.builds(
    Shape,
    seed=st.integers(0, 2**32),
    verify_steps=st.integers(0, 6),
    prompt_parts=st.integers(0, 3),
    drafted=st.integers(0, 6),
    trees=st.booleans(),
    way=st.sampled_from(get_args(Features)),
    width=st.integers(1, 5),
    top_k=st.integers(1, 4),
    vocabulary=st.sampled_from([None, 50, 60]),
)


@dataclass(frozen=True)
class Sent:
    """A record, and the features of its claim check."""

    record: Record
    claim: U16 | None


def ids(rng: Rng, n: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, 50, n).tolist())


def draft(rng: Rng, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return tokens, parents and accepted nodes."""
    m = int(rng.integers(0, shape.drafted + 1))
    parents = tuple(int(rng.integers(ROOT, node)) for node in range(m)) if shape.trees else chain(m)
    accepted: list[int] = []
    node = int(rng.integers(ROOT, m)) if m else ROOT
    while node != ROOT:
        accepted.insert(0, node)
        node = parents[node]
    return ids(rng, m), parents, tuple(accepted)


def drafted_by(rng: Rng, drafted: int) -> tuple[tuple[int, ...] | None, str]:
    """Return sources and version."""
    version = str(rng.integers(3)) if drafted else ""
    if rng.integers(2):
        return None, version
    sources = tuple(rng.integers(1, 8, drafted).tolist())
    return sources, version if any(source & DraftSource.SPECULATOR for source in sources) else ""


def a_verify_step(rng: Rng, shape: Shape, number: int, position: int, root: int | None, *, ends: bool) -> VerifyStep:
    drafted, parents, accepted = draft(rng, shape) if number else ((), (), ())
    prompt = ids(rng, int(rng.integers(1, 4)))
    tokens = prompt if root is None else (root, *(drafted[node] for node in accepted))
    verified = 1 + len(drafted) if ends else 0
    sources, speculator = drafted_by(rng, len(drafted))
    return VerifyStep(
        verify_step=number,
        position=position,
        tokens=tokens,
        features=rng.integers(0, 0x7F80, (len(tokens), shape.width), dtype=np.uint16),
        draft_tokens=drafted,
        draft_parents=parents,
        draft_logprobs=tuple((-rng.random(len(drafted))).tolist()),
        accepted=accepted,
        bonus=ids(rng, 1)[0] if ends else None,
        top_ids=rng.integers(0, 50, (verified, shape.top_k), dtype=np.int32),
        top_logprobs=-rng.random((verified, shape.top_k), dtype=np.float32),
        speculator=speculator,
        draft_sources=sources,
        draft_us=int(rng.integers(99)),
        verify_us=int(rng.integers(99)),
        time_us=int(rng.integers(2**50)),
        active_since_us=int(rng.integers(2**50)) if rng.integers(2) else None,
    )


def valid(shape: Shape) -> Chunk:
    """Return a valid chunk."""
    rng = np.random.default_rng(shape.seed)
    number = 0 if shape.prompt_parts else int(rng.integers(1, 5))
    position = 0 if shape.prompt_parts else int(rng.integers(1, 9))
    before = ids(rng, position) if shape.way == "recompute" and position and shape.verify_steps else ()
    verify_steps: list[VerifyStep] = []
    for i in range(shape.verify_steps):
        in_prompt = i < shape.prompt_parts
        root = None if in_prompt else verify_steps[-1].bonus if verify_steps else ids(rng, 1)[0]
        verify_steps.append(
            a_verify_step(rng, shape, number, position, root, ends=not in_prompt or i == shape.prompt_parts - 1)
        )
        position += len(verify_steps[-1].tokens)
        number += not in_prompt or i == shape.prompt_parts - 1
    envelope = Envelope(
        request=f"request-{shape.seed % 5}",
        chunk=shape.seed % 3,
        last=bool(rng.integers(2)),
        node=f"node-{shape.seed % 2}",
        target="target",
        line="line",
        features=shape.way,
        feature_width=shape.width,
        top_k=shape.top_k,
        temperature=float(rng.random()),
        top_p=float(rng.random()),
        seed=int(rng.integers(9)) if rng.integers(2) else None,
        label="ünï" if rng.integers(2) else None,
        finish="stop" if rng.integers(2) else None,
        claim=Claim("file:///a", "0" * 32, 9) if shape.way == "claim-check" else None,
        preceding_tokens=before,
        vocab_size=shape.vocabulary,
        start_us=int(rng.integers(2**50)) if rng.integers(2) else None,
        prompt_key=f"{shape.seed % 7:016x}" if rng.integers(2) else None,
    )
    return Chunk(envelope, tuple(verify_steps))


def send(chunk: Chunk, offset: int, partition: int = 0, value: bytes | None = None) -> Sent:
    """Return the record that a node sends, or the same with another value."""
    way, verify_steps = chunk.envelope.features, chunk.verify_steps
    claim = np.concatenate([r.features for r in verify_steps]) if way == "claim-check" and verify_steps else None
    bare = chunk if way == "inline" else replace(chunk, verify_steps=tuple(map(drop_features, verify_steps)))
    headers = {
        "content-type": trace.CONTENT_TYPE,
        "schema": trace.SCHEMA_ID,
        "node": chunk.envelope.node,
        "target": chunk.envelope.target,
        "rows": str(len(verify_steps)),
    }
    as_bytes = tuple((name, text.encode()) for name, text in headers.items())
    key = chunk.envelope.request.encode()
    return Sent(
        Record("traces", partition, offset, 5_000, key, encode(bare) if value is None else value, as_bytes), claim
    )


def compare_with_reference(sent: Sequence[Sent], window: int = 0) -> dict[str, int]:
    """Compare everything and return the reasons of the dead letters."""

    def reader() -> Callable[[Claim, int, int], U16]:
        # Both read the claim checks of valid records, in their order.
        claims = {(len(s.claim), s.claim.shape[1]): s.claim for s in sent if s.claim is not None}

        def get(_claim: Claim, tokens: int, width: int) -> U16:
            if (tokens, width) not in claims:
                raise TraceError("claim_missing", f"no {tokens} by {width}")
            return claims[tokens, width]

        return get

    records = [s.record for s in sent]
    built = build(records, CONTEXT, reader(), DeduplicationWindow(window))
    expected = slow_batches.build(records, CONTEXT, reader(), window)
    letters = ["offset", "reason", "detail", "rows"]
    assert (
        built.rows["dead_letters"].select(letters).to_pylist() == expected["dead_letters"].select(letters).to_pylist()
    )
    for name, rows in expected.items():
        assert built.rows[name].schema == rows.schema
        found, wanted = comparable(built.rows[name]), comparable(rows)
        assert found.to_pylist() == wanted.to_pylist(), name
        assert found.equals(wanted), name
        built.rows[name].validate(full=True)
    return dict(built.dead_letters)


def comparable(rows: pa.Table) -> pa.Table:
    """Replace unknown log-probabilities by a number, because NaN is not equal to itself."""
    if "draft_logprobs" not in rows.column_names:
        return rows
    at = rows.column_names.index("draft_logprobs")
    lists = [[2.0 if np.isnan(value) else value for value in row] for row in rows.column(at).to_pylist()]
    return rows.set_column(at, rows.schema.field(at), pa.array(lists, rows.schema.field(at).type))


@settings(deadline=None, max_examples=60)
@given(st.lists(shapes, max_size=6))
def test_valid_records_give_the_rows_of_the_reference(made: list[Shape]) -> None:
    assert compare_with_reference([send(valid(shape), offset) for offset, shape in enumerate(made)]) == {}


@settings(deadline=None, max_examples=30)
@given(st.lists(shapes, min_size=1, max_size=8), st.integers(0, 6))
def test_duplicates_are_the_dead_letters_of_the_reference(made: list[Shape], window: int) -> None:
    several = [made[i % len(made)] for i in range(3 * len(made))]
    sent = [send(valid(shape), offset, partition=offset % 2) for offset, shape in enumerate(several)]
    assert set(compare_with_reference(sent, window)) <= {"duplicate"}


def other_int(rng: Rng, value: int) -> int:
    return int(rng.choice([value - 1, value + 1, -1, 0, 55, 2**31 - 1]))


def other_list(rng: Rng, values: tuple[Any, ...], entry: Callable[[], Any]) -> tuple[Any, ...]:
    """Add, remove or change one entry."""
    at = int(rng.integers(len(values))) if values else 0
    match int(rng.integers(3)):
        case 0:
            return (*values[:at], entry(), *values[at:])
        case 1:
            return (*values[:at], *values[at + 1 :])
        case _:
            return (*values[:at], entry(), *values[at + 1 :])


def other_features(rng: Rng, bits: U16) -> U16:
    if not len(bits) or rng.integers(2):
        return np.concatenate([bits, np.zeros((1, bits.shape[1]), np.uint16)])
    changed = bits.copy()
    changed[rng.integers(len(bits)), rng.integers(bits.shape[1])] = rng.choice([0x7F80, 0xFF80, 0x7FC1, 0xFFFF])
    return changed


def other_scalar(rng: Rng, name: str, value: Any) -> object:
    match name:
        case "time_us" | "active_since_us":
            return int(rng.choice([2**62, -1]))
        case "bonus":
            return None if rng.integers(2) else other_int(rng, value or 0)
        case "speculator":
            return "" if rng.integers(2) else "9"
        case _:
            return other_int(rng, value)


def invalidate(rng: Rng, chunk: Chunk) -> Chunk:
    """Change one field of one verify step, which may or may not make the chunk invalid."""
    at = int(rng.integers(len(chunk.verify_steps)))
    r = chunk.verify_steps[at]
    name = str(rng.choice([f for f in VerifyStep.__slots__ if f not in ("draft_us", "verify_us")]))
    value = getattr(r, name)
    match name:
        case "verify_step" | "position" | "time_us" | "active_since_us" | "bonus" | "speculator":
            new: object = other_scalar(rng, name, value)
        case "tokens" | "draft_tokens":
            new = other_list(rng, value, lambda: other_int(rng, 3))
        case "draft_parents" | "accepted":
            new = other_list(rng, value, lambda: int(rng.integers(-2, 7)))
        case "draft_sources":
            new = other_list(rng, value or (), lambda: int(rng.choice([-1, 0, 1, 2, 4, 5, 7, 8])))
        case "draft_logprobs":
            new = other_list(rng, value, lambda: float(rng.choice([-1.0, np.nan, np.inf])))
        case "features":
            new = other_features(rng, value)
        case "top_ids":
            new = value[:-1] if rng.integers(2) else np.where(rng.random(value.shape) < 0.1, other_int(rng, 0), value)
        case _:
            new = value[:-1] if rng.integers(2) else np.where(rng.random(value.shape) < 0.1, np.nan, value)
    verify_steps = [*chunk.verify_steps]
    verify_steps[at] = replace(r, **{name: new})
    return replace(chunk, verify_steps=tuple(verify_steps))


def rewritten(sent: Sent, change: Callable[[pa.Table], Sequence[pa.Table]]) -> Sent:
    """Return the record with headers or values of another producer."""
    value = sent.record.value or b""
    with pa.ipc.open_stream(value[: -trace.CHECKSUM_BYTES]) as reader:
        parts = change(reader.read_all())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, parts[0].schema) as writer:
        for part in parts:
            writer.write_table(part)
    stream = sink.getvalue()
    value = stream.to_pybytes() + trace.checksum(stream)
    return replace(sent, record=replace(sent.record, value=value))


def with_null(rng: Rng) -> Callable[[pa.Table], Sequence[pa.Table]]:
    """Put a null into a column, or into one of its lists."""

    def change(table: pa.Table) -> Sequence[pa.Table]:
        name, row = str(rng.choice(SCHEMA.names)), int(rng.integers(table.num_rows))
        values = (table[name].cast(pa.int64()) if name in ("time", "active_since") else table[name]).to_pylist()
        if isinstance(values[row], list) and values[row] and rng.integers(2):
            values[row][int(rng.integers(len(values[row])))] = None
        else:
            values[row] = None
        column = pa.array(values, SCHEMA.field(name).type)
        at = table.schema.get_field_index(name)
        return [table.set_column(at, pa.field(name, column.type), column)]

    return change


@settings(deadline=None, max_examples=150)
@given(st.lists(shapes.filter(lambda s: s.verify_steps > 0), min_size=1, max_size=4), st.integers(0, 2**32), st.data())
def test_invalid_records_are_rejected_like_the_reference_and_affect_no_other(
    made: list[Shape], seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    sent = []
    for offset, shape in enumerate(made):
        chunk = valid(shape)
        match data.draw(st.sampled_from(["valid", "invalid", "null", "split"])):
            case "valid":
                sent.append(send(chunk, offset))
            case "invalid":
                sent.append(send(invalidate(rng, chunk), offset))
            case "null":
                sent.append(rewritten(send(chunk, offset), with_null(rng)))
            case "split":
                sent.append(rewritten(send(chunk, offset), lambda table: [table.slice(0, 1), table.slice(1)]))
    compare_with_reference(sent)


@settings(deadline=None, max_examples=50)
@given(shapes, st.integers(0, 2**32))
def test_altered_bytes_are_rejected_like_the_reference(shape: Shape, seed: int) -> None:
    rng = np.random.default_rng(seed)
    value = bytearray(send(valid(shape), 0).record.value or b"")
    flipped = bytearray(value)
    flipped[rng.integers(len(value))] ^= 1 << int(rng.integers(8))
    cut = value[: rng.integers(len(value))]
    sent = [send(valid(shape), offset, value=bytes(v)) for offset, v in enumerate((value, flipped, cut, value))]
    dead = compare_with_reference(sent)
    assert sum(dead.values()) == 2
    assert set(dead) <= {"corrupt", "truncated"}


@settings(deadline=None)
@given(shapes.filter(lambda s: s.verify_steps > 0), st.integers(0, 2**32))
def test_decode_rejects_the_chunks_that_the_reference_rejects(shape: Shape, seed: int) -> None:
    value = send(invalidate(np.random.default_rng(seed), valid(shape)), 0).record.value or b""

    def outcome(read: Callable[[bytes], Chunk]) -> object:
        try:
            return encode(read(value))
        except TraceError as error:
            return error.reason, error.detail

    assert outcome(decode) == outcome(slow_batches.decode)
