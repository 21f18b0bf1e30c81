"""The trace record and its encoder: the result of verification, one row per verify step.

A *chunk* is one Kafka message: consecutive verify steps of one request, as an Arrow IPC stream with zstd-compressed
buffers. The schema's metadata holds the envelope, the fields common to all rows (request, target, line, sampling). The
stream is followed by eight bytes, its length and its CRC-32. An Arrow reader stops at the end-of-stream marker and
ignores them; Aurora's decoder rejects a chunk whose bytes were truncated or altered.

Tokens of a request by verify step, for the prompt ``a b c`` and the output ``D E F G``::

    step 0  tokens a b c   no draft                              bonus D     (prefill)
    step 1  tokens D E     drafted E X, accepted node 0 (E)      bonus F
    step 2  tokens F       drafted Y Z, accepted nothing         bonus G

``tokens`` are the tokens that the target consumed and that were kept: the root (the bonus token of the previous step)
and the accepted draft tokens. The tokens of all steps, followed by the last bonus token, are the complete request.
``features`` has one row per token of ``tokens``. ``top_ids`` has one row for the root (in step 0 the last prompt token)
and one per draft token, also past the first rejection. A long prompt is split into several rows of step 0, and only the
last of them has a bonus token.

The envelope names how the features reach the trainer:

``inline``       in the rows.
``claim-check``  in a file of the object store (``schemas.claim_store``); the envelope has its URI and checksum.
``recompute``    not at all: the trainer runs the frozen target over the tokens. The envelope also has the tokens that
                 precede the chunk, so that a chunk depends on no other chunk.
``dropped``      not at all, and nothing is trained on the chunk: the node's byte budget did not suffice for them. Its
                 verify steps are complete otherwise, so that acceptance is counted over all traffic.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter

CONTENT_TYPE = "application/vnd.apache.arrow.stream"
FORMAT_NAME, FORMAT_MAJOR = "aurora.trace", 3
FORMAT = f"{FORMAT_NAME}/{FORMAT_MAJOR}"
"""Name and major version. Within a major version, releases add nullable columns, and fields with defaults to the
envelope; readers ignore what they do not know, and read what is missing as null."""
SCHEMA_ID = "4827b9523596cac4"
"""The header ``schema``. Readers of this release ignore it; those before it read no record with another value."""
ROOT = -1
"""Parent of a draft token that follows the root."""

Features = Literal["inline", "claim-check", "recompute", "dropped"]
Token = Annotated[int, Field(ge=0, lt=2**31)]
U16 = npt.NDArray[np.uint16]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

CHECKSUM_BYTES = 8
INT32_MAX = 2**31 - 1
TIME_END_US = 253_402_300_800_000_000
"""The year 10000: readers of the tables support no later time."""

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
        pa.field("draft_sources", pa.list_(pa.int8()), nullable=True),
        pa.field("active_since", pa.timestamp("us", tz="UTC"), nullable=True),
    ]
)
ADDED_COLUMNS = ("draft_sources", "active_since")
"""Columns of ``SCHEMA`` that chunks of older nodes lack. They are read as null."""


class DraftSource(IntFlag):
    """What proposed a draft token. A token that both drafters proposed has both bits, a forced token only its own."""

    SPECULATOR = 1
    SUFFIX = 2
    GRAMMAR = 4


class TraceError(ValueError):
    """A chunk that cannot be used. ``reason`` is a stable code for metrics and dead letters."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True, eq=False)
class VerifyStep:
    """One verify step of one request.

    Shapes: F = feature width (3H), k = teacher width, n = ``len(tokens)``, m = draft tokens.
    """

    verify_step: int
    """Number of the step in the request; 0 is the prefill."""
    position: int
    """Position of ``tokens[0]`` in the request, counted from the first prompt token."""
    tokens: tuple[int, ...]
    features: U16
    """[n, F] bf16 bit patterns: the captured hidden states of the target after each of ``tokens``; [0, F] if the chunk
    does not carry them."""
    draft_tokens: tuple[int, ...]
    draft_parents: tuple[int, ...]
    """Index of the parent of each draft token, or ``ROOT``. A chain is ``-1, 0, 1, ...``."""
    draft_logprobs: tuple[float, ...]
    """Log-probability of each draft token under the distribution of ``speculator`` before temperature, or the estimate
    of the suffix drafter for a token that it alone proposed; NaN if unknown: SGLang keeps none."""
    accepted: tuple[int, ...]
    """Indices of the accepted draft tokens, from the root's child on."""
    bonus: int | None
    """The target's token after the last accepted draft token; None inside a prompt."""
    top_ids: I32
    """[1 + m, k] the target's most likely tokens at the root and after each draft token, best first; [0, k] without a
    bonus token."""
    top_logprobs: F32
    """[1 + m, k] their log-probabilities, before temperature."""
    speculator: str
    """Version that proposed at least one of the draft tokens; without draft tokens, the active version. Empty where
    other sources proposed all of them, in prefill, and without a version that may draft for the request."""
    draft_us: int
    verify_us: int
    time_us: int
    """Unix time in microseconds at which the tokens were committed."""
    draft_sources: tuple[int, ...] | None = None
    """[m] ``DraftSource`` of each draft token; None if ``speculator`` proposed all of them."""
    active_since_us: int | None = None
    """Unix time in microseconds at which the node swapped ``speculator`` in, or started with it; None without one."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Reference to the file with the features of a chunk."""

    uri: str
    checksum: str
    """BLAKE2b of the file, 16 bytes in hexadecimal."""
    size: PositiveInt
    """Size of the file in bytes."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields common to all verify steps of a chunk."""

    request: str
    chunk: NonNegativeInt
    """Number of the chunk in the request, from 0, so that a gap is detected."""
    last: bool
    """Whether this is the last chunk of the request."""
    node: str
    target: str
    """Fingerprint of the target's weights and configuration."""
    line: str
    features: Features
    """How the features reach the trainer."""
    feature_width: PositiveInt
    """F: values per token in ``features``."""
    top_k: PositiveInt
    """k: target tokens recorded per position."""
    temperature: float
    top_p: float
    sampling_top_k: NonNegativeInt = 0
    """Most likely tokens that the output was sampled from; 0 for all."""
    seed: int | None = None
    label: str | None = None
    """Traffic label of the request; any text."""
    finish: str | None = None
    """Why the request ended, on its last chunk."""
    claim: Claim | None = None
    """The file with the features, with ``claim-check``."""
    preceding_tokens: tuple[Token, ...] = ()
    """With ``recompute``, all tokens of the request before this chunk; empty also if they are unknown."""
    vocab_size: PositiveInt | None = None
    """Size of the target's vocabulary, the exclusive bound of token ids; None if the node does not send it."""
    start_us: Annotated[int, Field(ge=0, lt=TIME_END_US)] | None = None
    """Unix time of the request's first row in microseconds; None if it was dropped, or the node does not send it."""
    prompt_key: str | None = None
    """Hash of the prompt (``schemas.hash_sampling.prompt_key``); None if the node does not send it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive verify steps of one request: one Kafka message, keyed by the request id."""

    envelope: Envelope
    verify_steps: tuple[VerifyStep, ...]


ENVELOPE_JSON = TypeAdapter(Envelope)
"""Serializer of the envelope in the schema's metadata."""


def encode(chunk: Chunk) -> bytes:
    """Return the Arrow IPC stream of a chunk, followed by its checksum.

    Raises:
        OverflowError: a number does not fit into its column.
        ValueError: the arrays of a verify step have inconsistent shapes.
        pyarrow.ArrowException: a value has the wrong type.
    """
    schema = SCHEMA.with_metadata({"format": FORMAT, "envelope": ENVELOPE_JSON.dump_json(chunk.envelope)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch([_column(f, chunk.verify_steps) for f in SCHEMA], schema=schema))
    stream = sink.getvalue()
    return b"".join((stream, checksum(stream)))


def checksum(stream: bytes | pa.Buffer) -> bytes:
    """Return the bytes that follow the Arrow stream: a CRC, which detects accidents at memory speed."""
    return struct.pack("<II", len(stream) & 0xFFFFFFFF, zlib.crc32(stream))


def _column(field: pa.Field, verify_steps: Sequence[VerifyStep]) -> pa.Array:
    """Return one column of a chunk."""
    match field.name:
        case "features":
            # Features are nine tenths of a chunk: they are concatenated once and not copied again.
            parts = [np.ascontiguousarray(step.features, dtype="<u2") for step in verify_steps]
            offsets = np.cumsum([0, *(part.nbytes for part in parts)], dtype=np.int64)
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(part.data for part in parts))]
            return pa.LargeBinaryArray.from_buffers(field.type, len(verify_steps), buffers)
        case "top_ids" | "top_logprobs":
            return pa.array([getattr(step, field.name).ravel() for step in verify_steps], type=field.type)
        case "time" | "active_since":
            return pa.array([getattr(step, f"{field.name}_us") for step in verify_steps], type=field.type)
        case _:
            return pa.array([getattr(step, field.name) for step in verify_steps], type=field.type)
