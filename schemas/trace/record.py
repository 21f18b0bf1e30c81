"""The trace record: what the verifier decided, one row per verify step.

A *chunk* is one Kafka message: consecutive verify steps of one request, as an Arrow IPC stream with zstd-compressed
buffers. What is true of the whole chunk (request, target, line, sampling) stands once, in the schema's metadata; what
changes from verify step to verify step stands in the rows. Eight bytes follow the stream, its length and its CRC-32:
an Arrow
reader stops at the end-of-stream marker and never sees them, ours refuses a chunk whose bytes were cut or altered.

How the tokens of a request lie in its verify steps, for the prompt ``a b c`` and the answer ``D E F G``::

    verify step 0  tokens a b c   no draft                              bonus D     (prefill)
    verify step 1  tokens D E     drafted E X, accepted node 0 (E)      bonus F
    verify step 2  tokens F       drafted Y Z, accepted nothing         bonus G

``tokens`` are those the target consumed and kept: the root (the bonus of the verify step before) and the accepted
drafts.
Concatenated over the verify steps, and followed by the last bonus, they are the whole request. ``features`` has one
row per
token of ``tokens``; ``top_ids`` has one row for the root (the last prompt token in verify step 0) and one per
drafted node,
also past the first rejection. A long prompt is cut into several rows of verify step 0; only the last of them has a
bonus.

Features travel in one of three ways, which the envelope names:

``inline``       in the rows.
``claim-check``  in a file of the object store, ``schemas.claim_store``; the envelope has its address and checksum.
``recompute``    not at all: the trainer runs the frozen target over the tokens. For that the envelope has the tokens
                 before the chunk too, so that a chunk still depends on nothing but itself.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter

CONTENT_TYPE = "application/vnd.apache.arrow.stream"
FORMAT = "aurora.trace/2"
ROOT = -1
"""Parent of a drafted node that follows the root directly."""

Features = Literal["inline", "claim-check", "recompute"]
Token = Annotated[int, Field(ge=0, lt=2**31)]
U16 = npt.NDArray[np.uint16]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

CHECKSUM_BYTES = 8
INT32_MAX = 2**31 - 1

SCHEMA = pa.schema(
    [
        pa.field("verify_step", pa.int32(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("features", pa.large_binary(), nullable=False),
        pa.field("draft_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("draft_parents", pa.list_(pa.int16()), nullable=False),
        pa.field("draft_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("accepted", pa.list_(pa.int16()), nullable=False),
        pa.field("bonus", pa.int32(), nullable=True),
        pa.field("top_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("top_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("speculator", pa.string(), nullable=False),
        pa.field("draft_us", pa.int32(), nullable=False),
        pa.field("verify_us", pa.int32(), nullable=False),
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)


class TraceError(ValueError):
    """A chunk that cannot be used. ``reason`` is a stable code for counters and dead letters."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, eq=False)
class VerifyStep:
    """One verify step of one request.

    Shapes: F = feature width (3H), k = teacher width, n = ``len(tokens)``, m = drafted nodes.
    """

    verify_step: int
    position: int
    """Position of ``tokens[0]`` in the request, counted from the first prompt token."""
    tokens: tuple[int, ...]
    features: U16
    """[n, F] bf16 bit patterns: the captured target states after consuming each of ``tokens``; [0, F] where the chunk
    does not carry them."""
    draft_tokens: tuple[int, ...]
    draft_parents: tuple[int, ...]
    """For each drafted node the index of its parent node, or ``ROOT``. A chain is ``-1, 0, 1, ...``."""
    draft_logprobs: tuple[float, ...]
    """Log-probability that the draft gave each node, under the distribution it was drawn from; NaN where that is not
    known: SGLang keeps none."""
    accepted: tuple[int, ...]
    """Indices of the accepted nodes, from the root's child on."""
    bonus: int | None
    """Token the target chose after the last accepted node; None for a part of a prompt that is not its end."""
    top_ids: I32
    """[1 + m, k] the target's likeliest tokens at the root and after each node, best first; [0, k] without a bonus."""
    top_logprobs: F32
    """[1 + m, k] their log-probabilities, before temperature."""
    speculator: str
    """Version that drafted this verify step; empty where nothing was drafted."""
    draft_us: int
    verify_us: int
    time_us: int
    """Unix time in microseconds at which the verify step was committed."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Where the features of a chunk lie."""

    uri: str
    checksum: str
    """BLAKE2b of the whole file, 16 bytes in hexadecimal."""
    size: PositiveInt
    """Bytes of the file."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What is true of every verify step in a chunk."""

    request: str
    chunk: NonNegativeInt
    """Counts the chunks of a request from 0, so that a gap is seen."""
    last: bool
    node: str
    target: str
    """Fingerprint of the target's weights and configuration."""
    line: str
    features: Features
    """How the target states travel."""
    feature_width: PositiveInt
    """F: values per token in ``features``."""
    top_k: PositiveInt
    """k: target tokens recorded per position."""
    temperature: float
    top_p: float
    sampling_top_k: NonNegativeInt = 0
    """Likeliest tokens that answers were drawn from; 0 for all of them."""
    seed: int | None = None
    label: str | None = None
    """Traffic label given by the client; any text."""
    finish: str | None = None
    """Why the request ended, on its last chunk."""
    claim: Claim | None = None
    """Where the features are, with ``claim-check``."""
    before: tuple[Token, ...] = ()
    """With ``recompute`` every token of the request before this chunk; empty also where they are not known any more."""
    vocabulary: PositiveInt | None = None
    """Size of the target's vocabulary: every token id is below it. None where the node does not say."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive verify steps of one request: one Kafka message, keyed by the request."""

    envelope: Envelope
    verify_steps: tuple[VerifyStep, ...]


ENVELOPE_JSON = TypeAdapter(Envelope)
"""Writes and reads the envelope as it stands in the schema's metadata."""


@cache
def fingerprint() -> str:
    """Identity of the wire schema, sent as a header so that a consumer sees a foreign record before it parses one."""
    shape = FORMAT + SCHEMA.to_string() + ",".join(f.name for f in fields(Envelope))
    return hashlib.sha256(shape.encode()).hexdigest()[:16]


@cache
def readable() -> frozenset[str]:
    """Fingerprints of the wire schemas that can be read: a topic outlives the nodes that wrote into it.

    Where a field with a default is added, the fingerprint without it stays among them.
    """
    return frozenset({fingerprint()})


def encode(chunk: Chunk) -> bytes:
    """Arrow IPC stream of one chunk, followed by its checksum.

    Raises:
        OverflowError: a number does not fit into its column.
        ValueError: the arrays of a verify step do not fit together.
        pyarrow.ArrowException: a value of another kind.
    """
    schema = SCHEMA.with_metadata({"format": FORMAT, "envelope": ENVELOPE_JSON.dump_json(chunk.envelope)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch([_column(f, chunk.verify_steps) for f in SCHEMA], schema=schema))
    stream = sink.getvalue()
    return b"".join((stream, checksum(stream)))


def to_bf16(x: npt.NDArray[np.float32]) -> U16:
    """Bit patterns of ``x`` rounded to bfloat16 (to nearest, ties to even); NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: U16) -> F32:
    """float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def checksum(stream: bytes | pa.Buffer) -> bytes:
    """What follows the Arrow stream of a chunk. A CRC, because it guards against accidents and runs at memory speed."""
    return struct.pack("<II", len(stream) & 0xFFFFFFFF, zlib.crc32(stream))


def _column(field: pa.Field, verify_steps: Sequence[VerifyStep]) -> pa.Array:
    """One field of all verify steps."""
    match field.name:
        case "features":
            # Nine tenths of a chunk: laid end to end once, and not copied again.
            parts = [np.ascontiguousarray(r.features, dtype="<u2") for r in verify_steps]
            offsets = np.cumsum([0, *(part.nbytes for part in parts)], dtype=np.int64)
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(part.data for part in parts))]
            return pa.LargeBinaryArray.from_buffers(field.type, len(verify_steps), buffers)
        case "top_ids" | "top_logprobs":
            return pa.array([getattr(r, field.name).ravel() for r in verify_steps], type=field.type)
        case "time":
            return pa.array([r.time_us for r in verify_steps], type=field.type)
        case _:
            return pa.array([getattr(r, field.name) for r in verify_steps], type=field.type)
