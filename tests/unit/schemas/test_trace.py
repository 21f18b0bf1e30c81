"""The trace codec: an encoded chunk is decoded bit for bit, and every other input raises a clear error."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from bfloat16 import from_bf16, to_bf16
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.trace import decoder, record
from schemas.trace.decoder import decode, open_chunk
from schemas.trace.ipc_sizes import declared_bytes
from schemas.trace.record import ROOT, SCHEMA, Chunk, Claim, Envelope, Features, TraceError, VerifyStep, encode

TOKEN = st.integers(0, 2**31 - 1)
FLOAT = st.floats(width=32, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def verify_steps(draw: st.DrawFn, width: int, k: int, way: Features) -> VerifyStep:
    number = draw(st.integers(0, 5))
    m = draw(st.integers(0, 5)) if number else 0
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(m))
    drafted = tuple(draw(TOKEN) for _ in range(m))
    accepted: list[int] = []
    if m and draw(st.booleans()):
        node = draw(st.integers(0, m - 1))
        while node >= 0:
            accepted.insert(0, node)
            node = parents[node]
    kept = tuple(drafted[node] for node in accepted)
    tokens = (draw(TOKEN), *kept) if number else tuple(draw(st.lists(TOKEN, min_size=1, max_size=4)))
    bonus = draw(TOKEN) if number or draw(st.booleans()) else None
    verified = 0 if bonus is None else 1 + m
    sources = st.integers(-(2**7), 2**7 - 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return VerifyStep(
        verify_step=number,
        position=draw(st.integers(0, 2**31 - 1)),
        tokens=tokens,
        features=rng.integers(0, 2**16, (len(tokens) if way == "inline" else 0, width), dtype=np.uint16),
        draft_tokens=drafted,
        draft_parents=parents,
        draft_logprobs=tuple(draw(FLOAT) for _ in range(m)),
        accepted=tuple(accepted),
        bonus=bonus,
        top_ids=rng.integers(0, 2**31 - 1, (verified, k), dtype=np.int32),
        top_logprobs=rng.standard_normal((verified, k)).astype(np.float32),
        speculator=draw(TEXT),
        draft_us=draw(st.integers(0, 2**31 - 1)),
        verify_us=draw(st.integers(0, 2**31 - 1)),
        time_us=draw(st.integers(0, 2**52)),
        draft_sources=draw(st.none() | st.tuples(*[sources] * m)),
        active_since_us=draw(st.none() | st.integers(0, 2**52)),
    )


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    width, k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    way: Features = draw(st.sampled_from(get_args(Features)))
    made = draw(st.lists(verify_steps(width, k, way), max_size=4))
    before: list[int] = draw(st.lists(TOKEN, max_size=9)) if way == "recompute" and made else []
    if before:
        made[0] = replace(made[0], position=len(before))
    envelope = Envelope(
        request=draw(TEXT),
        chunk=draw(st.integers(0, 2**31 - 1)),
        last=draw(st.booleans()),
        node=draw(TEXT),
        target=draw(TEXT),
        line=draw(TEXT),
        features=way,
        feature_width=width,
        top_k=k,
        temperature=draw(st.floats(0, 2)),
        top_p=draw(st.floats(0, 1)),
        sampling_top_k=draw(st.integers(0, 2**31 - 1)),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        label=draw(st.none() | TEXT),
        finish=draw(st.none() | TEXT),
        claim=Claim(draw(TEXT), draw(TEXT), draw(st.integers(1, 2**40))) if way == "claim-check" else None,
        preceding_tokens=tuple(before),
        vocab_size=draw(st.none() | st.integers(1, 2**31)),
        start_us=draw(st.none() | st.integers(0, 2**52)),
        prompt_key=draw(st.none() | TEXT),
    )
    return Chunk(envelope, tuple(made))


def plain(r: VerifyStep) -> dict[str, object]:
    """A verify step as comparable values."""
    return {
        name: value.tolist() if isinstance(value := getattr(r, name), np.ndarray) else value
        for name in VerifyStep.__slots__
    }


ENVELOPE = Envelope(
    request="r",
    chunk=0,
    last=True,
    node="n",
    target="t",
    line="l",
    features="inline",
    feature_width=2,
    top_k=1,
    temperature=0.0,
    top_p=1.0,
)
ONE = VerifyStep(
    verify_step=1,
    position=4,
    tokens=(7, 8),
    features=np.zeros((2, 2), np.uint16),
    draft_tokens=(8, 9),
    draft_parents=(ROOT, 0),
    draft_logprobs=(-1.0, -2.0),
    accepted=(0,),
    bonus=3,
    top_ids=np.zeros((3, 1), np.int32),
    top_logprobs=np.zeros((3, 1), np.float32),
    speculator="1",
    draft_us=1,
    verify_us=1,
    time_us=1,
)
CHUNK = Chunk(ENVELOPE, (ONE,))


@settings(deadline=None)
@given(chunks())
def test_a_chunk_is_decoded_as_it_was_encoded(chunk: Chunk) -> None:
    value = encode(chunk)
    back = decode(value)
    assert back.envelope == chunk.envelope
    assert [plain(r) for r in back.verify_steps] == [plain(r) for r in chunk.verify_steps]
    assert encode(back) == value


@settings(max_examples=50, deadline=None)
@given(chunks(), st.data())
def test_truncated_or_altered_bytes_are_rejected(chunk: Chunk, data: st.DataObject) -> None:
    value = encode(chunk)
    at = data.draw(st.integers(0, len(value) - 1))
    flipped = value[:at] + bytes([value[at] ^ (1 << data.draw(st.integers(0, 7)))]) + value[at + 1 :]
    for altered in (value[:at], flipped, value + b"\0"):
        with pytest.raises(TraceError) as refused:
            decode(altered)
        assert refused.value.reason in ("corrupt", "truncated")


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_foreign_bytes_with_a_valid_checksum_are_rejected(junk: bytes) -> None:
    with pytest.raises(TraceError) as refused:
        decode(signed(junk))
    assert refused.value.reason in ("not_arrow", "truncated")


def signed(stream: bytes) -> bytes:
    return stream + record.checksum(stream)


def arrow(schema: pa.Schema, arrays: list[pa.Array]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return signed(sink.getvalue().to_pybytes())


def compressed(schema: pa.Schema, batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


@settings(deadline=None)
@given(chunks())
def test_declared_bytes_are_those_of_the_decompressed_buffers(chunk: Chunk) -> None:
    value = encode(chunk)[: -record.CHECKSUM_BYTES]
    with pa.ipc.open_stream(value) as reader:
        buffers = [buffer for batch in reader for column in batch.columns for buffer in column.buffers()]
    assert declared_bytes(pa.py_buffer(value)) == sum(buffer.size for buffer in buffers if buffer)


@pytest.mark.parametrize("kind", [pa.binary(), pa.dictionary(pa.int8(), pa.binary())])
def test_a_few_bytes_that_decompress_to_many_are_rejected(kind: pa.DataType) -> None:
    zeros = bytes(decoder.MAX_CHUNK_BYTES + 1)
    schema = pa.schema([pa.field("features", kind)])
    value = signed(compressed(schema, pa.record_batch([pa.array([zeros]).cast(kind)], schema=schema)))
    assert len(value) < 100_000
    with pytest.raises(TraceError, match="decompressed") as refused:
        decode(value)
    assert refused.value.reason == "too_large"


def test_a_buffer_that_declares_more_than_memory_holds_is_rejected_before_it_is_allocated() -> None:
    schema = pa.schema([pa.field("features", pa.int64())])
    stream = compressed(schema, pa.record_batch([pa.array([7] * 1_000)], schema=schema))
    declared = (8_000).to_bytes(8, "little")
    assert stream.count(declared) == 1
    for size in (1 << 40, 2**63 - 1):
        with pytest.raises(TraceError) as refused:
            decode(signed(stream.replace(declared, size.to_bytes(8, "little"))))
        assert refused.value.reason == "too_large"


@settings(max_examples=300, deadline=None)
@given(chunks(), st.data())
def test_altered_streams_with_a_valid_checksum_end_in_a_trace_error_or_a_chunk(
    chunk: Chunk, data: st.DataObject
) -> None:
    stream = bytearray(encode(chunk)[: -record.CHECKSUM_BYTES])
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    with suppress(TraceError, pa.ArrowException, ValueError, KeyError, OverflowError):
        open_chunk(signed(bytes(stream)))
    assert pa.total_allocated_bytes() < decoder.MAX_CHUNK_BYTES


def test_the_error_for_another_format_names_it() -> None:
    schema = SCHEMA.with_metadata({"format": "aurora.trace/1"})
    with pytest.raises(TraceError, match=r"aurora\.trace/3.*aurora\.trace/1") as refused:
        decode(arrow(schema, [pa.array([], type=f.type) for f in SCHEMA]))
    assert refused.value.reason == "foreign_format"


def test_the_error_for_a_missing_column_names_it() -> None:
    schema = pa.schema([f for f in SCHEMA if f.name != "bonus"], metadata={"format": record.FORMAT})
    with pytest.raises(TraceError, match="bonus") as refused:
        decode(arrow(schema, [pa.array([], type=f.type) for f in schema]))
    assert refused.value.reason == "foreign_schema"


@pytest.mark.parametrize("envelope", [b"", b"{}", b'{"request": 1}'])
def test_an_incomplete_envelope_is_rejected(envelope: bytes) -> None:
    schema = SCHEMA.with_metadata({"format": record.FORMAT, "envelope": envelope})
    with pytest.raises(TraceError) as refused:
        decode(arrow(schema, [pa.array([], type=f.type) for f in SCHEMA]))
    assert refused.value.reason == "bad_envelope"


def test_the_error_for_an_envelope_field_of_the_wrong_type_names_it() -> None:
    fields = {name: getattr(ENVELOPE, name) for name in Envelope.__slots__} | {"top_k": 0}
    schema = SCHEMA.with_metadata({"format": record.FORMAT, "envelope": json.dumps(fields).encode()})
    with pytest.raises(TraceError, match="top_k") as refused:
        decode(arrow(schema, [pa.array([], type=f.type) for f in SCHEMA]))
    assert refused.value.reason == "bad_envelope"


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(replace(ONE, tokens=()), id="no token"),
        pytest.param(replace(ONE, tokens=(7,)), id="features for another number of tokens"),
        pytest.param(replace(ONE, draft_parents=(ROOT,)), id="a node without a parent"),
        pytest.param(replace(ONE, draft_parents=(1, ROOT)), id="a node before its parent"),
        pytest.param(replace(ONE, draft_logprobs=(-1.0,)), id="a node without a log-probability"),
        pytest.param(replace(ONE, draft_sources=(1,)), id="a node without a source"),
        pytest.param(replace(ONE, draft_sources=(1, 2, 2)), id="more sources than tokens"),
        pytest.param(replace(ONE, accepted=(1,)), id="accepted without its parent"),
        pytest.param(replace(ONE, accepted=(2,)), id="accepted but not drafted"),
        pytest.param(replace(ONE, tokens=(7, 9)), id="committed but not accepted"),
        pytest.param(replace(ONE, bonus=None), id="teacher without a bonus"),
        pytest.param(replace(ONE, top_ids=np.zeros((2, 1), np.int32)), id="a node without a teacher"),
        pytest.param(replace(ONE, top_logprobs=np.zeros((3, 2), np.float32)), id="more log-probabilities than tokens"),
    ],
)
def test_an_inconsistent_verify_step_is_rejected(bad: VerifyStep) -> None:
    with pytest.raises(TraceError) as refused:
        decode(encode(Chunk(ENVELOPE, (bad,))))
    assert refused.value.reason == "contradiction"


CLAIM = Claim("file:///claims/1.arrow", "0" * 32, 9)
BARE = replace(ONE, features=np.zeros((0, 2), np.uint16))


@pytest.mark.parametrize(
    ("envelope", "one"),
    [
        pytest.param(replace(ENVELOPE, features="claim-check"), BARE, id="a claim check without a claim"),
        pytest.param(replace(ENVELOPE, claim=CLAIM), ONE, id="a claim beside inline features"),
        pytest.param(replace(ENVELOPE, features="recompute", claim=CLAIM), BARE, id="a claim for nothing"),
        pytest.param(replace(ENVELOPE, features="claim-check", claim=CLAIM), ONE, id="features inline and claimed"),
        pytest.param(replace(ENVELOPE, features="recompute"), ONE, id="features inline and to be recomputed"),
        pytest.param(ENVELOPE, BARE, id="inline without features"),
        pytest.param(
            replace(ENVELOPE, features="recompute", preceding_tokens=(1, 2)), BARE, id="some tokens before are missing"
        ),
        pytest.param(
            replace(ENVELOPE, preceding_tokens=(1, 2, 3, 4)), ONE, id="tokens before although nothing is recomputed"
        ),
    ],
)
def test_features_that_do_not_match_the_envelope_are_rejected(envelope: Envelope, one: VerifyStep) -> None:
    with pytest.raises(TraceError) as refused:
        decode(encode(Chunk(envelope, (one,))))
    assert refused.value.reason == "contradiction"


def test_missing_envelope_fields_get_their_defaults() -> None:
    added = ("claim", "preceding_tokens", "vocab_size", "start_us")
    old = {name: getattr(ENVELOPE, name) for name in Envelope.__slots__ if name not in added}
    schema = SCHEMA.with_metadata({"format": record.FORMAT, "envelope": json.dumps(old).encode()})
    assert decode(arrow(schema, [pa.array([], type=f.type) for f in SCHEMA])).envelope == ENVELOPE


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127))
def test_bf16_rounds_to_the_nearest_value(x: float) -> None:
    value = float(from_bf16(to_bf16(np.array([x], np.float32)))[0])
    bits = int(to_bf16(np.array([x], np.float32))[0])
    neighbours = [
        float(from_bf16(np.array([bits + step], np.uint16))[0]) for step in (-1, 1) if 0 <= bits + step < 2**16
    ]
    assert all(abs(value - x) <= abs(other - x) for other in neighbours if math.isfinite(other))


def test_bf16_keeps_nan_and_infinity() -> None:
    x = np.array([np.nan, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(from_bf16(to_bf16(x)), x)


@pytest.mark.parametrize("missing", [["draft_sources", "active_since"], ["active_since"]])
def test_a_chunk_of_an_older_node_is_readable(missing: list[str]) -> None:
    with pa.ipc.open_stream(encode(CHUNK)[: -record.CHECKSUM_BYTES]) as reader:
        older = reader.read_all().drop_columns(missing)
    [step] = decode(arrow(older.schema, older.combine_chunks().to_batches()[0].columns)).verify_steps
    assert plain(step) == plain(ONE)


def test_columns_and_envelope_fields_of_a_newer_node_are_ignored() -> None:
    with pa.ipc.open_stream(encode(CHUNK)[: -record.CHECKSUM_BYTES]) as reader:
        own = reader.read_all()
    envelope = {**json.loads(own.schema.metadata[b"envelope"]), "newer": {"a": [1]}}
    newer = own.add_column(3, pa.field("newer", pa.list_(pa.string())), [[["x"]] * own.num_rows])
    schema = newer.schema.with_metadata({"format": record.FORMAT, "envelope": json.dumps(envelope)})
    chunk = decode(arrow(schema, newer.combine_chunks().to_batches()[0].columns))
    assert chunk.envelope == ENVELOPE
    assert [plain(step) for step in chunk.verify_steps] == [plain(ONE)]


def test_workers_of_earlier_releases_read_the_header_of_this_one() -> None:
    assert record.SCHEMA_ID == "4827b9523596cac4"
