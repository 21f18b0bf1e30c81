"""What can still be read of a record that could not be used: each layer by itself, as far as its bytes go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from schemas.trace.decoder import foreign_columns
from schemas.trace.record import CHECKSUM_BYTES, FORMAT, checksum

_BYTES_A_LINE = 16


def examine(value: bytes) -> dict[str, str]:
    """What each layer of a value says, from the outside in; no token of the request is among it."""
    stream, ending = value[:-CHECKSUM_BYTES], value[-CHECKSUM_BYTES:]
    found = {"checksum": "fits" if stream and checksum(stream) == ending else "does not fit: cut or altered"}
    try:
        reader = pa.ipc.open_stream(stream)
    except (pa.ArrowException, OSError) as error:
        return {**found, "stream": f"not Arrow: {error}"}
    metadata = reader.schema.metadata or {}
    named = metadata.get(b"format", b"").decode(errors="replace")
    found["format"] = named if named == FORMAT else f"{named or 'none'}, not {FORMAT}"
    found["columns"] = _columns(reader.schema)
    found["envelope"] = _envelope(metadata.get(b"envelope", b""))
    found["verify_steps"] = _verify_steps(reader)
    return found


def hexdump(value: bytes, limit: int) -> Iterator[str]:
    """Lines of the first ``limit`` bytes, as ``xxd`` writes them."""
    for start in range(0, min(len(value), limit), _BYTES_A_LINE):
        line = value[start : min(start + _BYTES_A_LINE, limit)]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        yield f"{start:08x}  {line.hex(' ', 2):<{_BYTES_A_LINE // 2 * 5}}  {text}"


def _columns(schema: pa.Schema) -> str:
    wrong = foreign_columns(schema)
    return "as expected" if not wrong else f"missing or of another type: {', '.join(wrong)}"


def _envelope(text: bytes) -> str:
    try:
        fields: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError):
        return "none" if not text else f"unreadable: {text[:200].decode(errors='replace')}"
    if isinstance(before := fields.get("before"), list):
        fields["before"] = f"{len(before)} tokens"
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _verify_steps(reader: pa.RecordBatchStreamReader) -> str:
    """How far the rows go, and what they span."""
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
