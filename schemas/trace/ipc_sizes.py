"""How large the buffers of an Arrow IPC stream become when they are decompressed, read from the stream's metadata.

A reader allocates what a compressed buffer declares, and a few kilobytes can declare gigabytes. The layout is that of
``Message.fbs`` in https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc;
pyarrow has verified the offsets in the metadata of every message that it returns.
"""

from __future__ import annotations

import struct

import pyarrow as pa

_HEADER_TYPE, _HEADER = 1, 2
"""Fields of ``Message``."""
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
"""Values of the union ``MessageHeader``."""
_DICTIONARY_DATA = 1
"""Field of ``DictionaryBatch``."""
_BUFFERS, _COMPRESSION = 2, 3
"""Fields of ``RecordBatch``."""
_LENGTH_BYTES = 8
"""A compressed buffer begins with its length after decompression; -1 if it is stored as it is."""


def declared_bytes(stream: pa.Buffer) -> int:
    """Return the bytes that the compressed buffers of an Arrow IPC stream declare.

    Raises:
        pyarrow.ArrowInvalid: the bytes are not messages of Arrow.
        struct.error: a message contradicts itself.
    """
    return sum(_declared(message) for message in pa.ipc.MessageReader.open_stream(stream))


def _declared(message: pa.ipc.Message) -> int:
    data, body = message.metadata, message.body
    root = _follow(data, 0)
    kind, header = _field(data, root, _HEADER_TYPE), _field(data, root, _HEADER)
    if kind is None or header is None or body is None:
        return 0
    number = struct.unpack_from("<B", data, kind)[0]
    batch = _follow(data, header)
    if number == _DICTIONARY_BATCH:
        inner = _field(data, batch, _DICTIONARY_DATA)
        if inner is None:
            return 0
        batch = _follow(data, inner)
    elif number != _RECORD_BATCH:
        return 0
    buffers = _field(data, batch, _BUFFERS)
    if buffers is None or _field(data, batch, _COMPRESSION) is None:
        return 0
    vector = _follow(data, buffers)
    count = struct.unpack_from("<I", data, vector)[0]
    places = struct.unpack_from(f"<{2 * count}q", data, vector + 4)
    lengths = (
        struct.unpack_from("<q", body, offset)[0]
        for offset, size in zip(places[::2], places[1::2], strict=True)
        if size >= _LENGTH_BYTES and 0 <= offset <= body.size - _LENGTH_BYTES
    )
    return sum(max(length, 0) for length in lengths)


def _follow(data: pa.Buffer, at: int) -> int:
    """Return the place that the offset at a place points to."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: pa.Buffer, table: int, number: int) -> int | None:
    """Return the place of a field of a flatbuffer table; None without it."""
    layout = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, layout)
    slot = 4 + 2 * number
    offset = struct.unpack_from("<H", data, layout + slot)[0] if slot < size else 0
    return table + offset if offset else None
