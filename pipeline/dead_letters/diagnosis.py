"""Diagnosis of an unusable record: reads each layer of its value separately, as far as its bytes allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from schemas.trace.decoder import mismatched_columns
from schemas.trace.record import CHECKSUM_BYTES, FORMAT, checksum

_BYTES_PER_LINE = 16


def diagnose(value: bytes) -> dict[str, str]:
    """Return the state of each layer of a value, from the outside in. It contains no token of the request."""
    stream, ending = value[:-CHECKSUM_BYTES], value[-CHECKSUM_BYTES:]
    is_intact = stream and checksum(stream) == ending
    layers = {"checksum": "matches" if is_intact else "does not match: the bytes were cut or altered"}
    try:
        reader = pa.ipc.open_stream(stream)
    except (pa.ArrowException, OSError) as error:
        return {**layers, "stream": f"not Arrow: {error}"}
    metadata = reader.schema.metadata or {}
    format_ = metadata.get(b"format", b"").decode(errors="replace")
    layers["format"] = format_ if format_ == FORMAT else f"{format_ or 'none'}, not {FORMAT}"
    layers["columns"] = _describe_columns(reader.schema)
    layers["envelope"] = _describe_envelope(metadata.get(b"envelope", b""))
    layers["verify_steps"] = _describe_verify_steps(reader)
    return layers


def hexdump(value: bytes, limit: int) -> Iterator[str]:
    """Yield the lines of the first ``limit`` bytes, in the format of ``xxd``."""
    for start in range(0, min(len(value), limit), _BYTES_PER_LINE):
        line = value[start : min(start + _BYTES_PER_LINE, limit)]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        yield f"{start:08x}  {line.hex(' ', 2):<{_BYTES_PER_LINE // 2 * 5}}  {text}"


def _describe_columns(schema: pa.Schema) -> str:
    wrong = mismatched_columns(schema)
    return "as expected" if not wrong else f"missing or of another type: {', '.join(wrong)}"


def _describe_envelope(text: bytes) -> str:
    try:
        fields: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError):
        return "none" if not text else f"unreadable: {text[:200].decode(errors='replace')}"
    if isinstance(preceding := fields.get("preceding_tokens"), list):
        fields["preceding_tokens"] = f"{len(preceding)} tokens"
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _describe_verify_steps(reader: pa.RecordBatchStreamReader) -> str:
    """Return the number of readable rows, and the range of their verify steps."""
    batches: list[pa.RecordBatch] = []
    ending = ""
    try:
        batches.extend(reader)
    except (pa.ArrowException, OSError) as error:
        ending = f"; then unreadable: {error}"
    rows = pa.Table.from_batches(batches, reader.schema)
    try:
        rows.validate(full=True)
        numbers = [number for number in rows["verify_step"].to_pylist() if number is not None]
        tokens = sum(map(len, filter(None, rows["tokens"].to_pylist())))
    except (pa.ArrowException, KeyError, TypeError, UnicodeDecodeError) as error:
        return f"{rows.num_rows} rows, unreadable: {error}{ending}"
    span = f", verify steps {min(numbers)} to {max(numbers)}, {tokens} tokens" if numbers else ""
    return f"{rows.num_rows} rows{span}{ending}"
