"""Claim checks: the features of a chunk in a file of the object store, which its record names by address and checksum.

A file is an Arrow IPC file with one row per token of the chunk, zstd-compressed, named after its own checksum in a
folder for its day: nothing that a client sent is part of a path, and a day can be thrown away whole. The store is
reached through ``pyarrow.fs``, which writer and reader need for Arrow anyway: folders, S3, and what else Arrow knows.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import fs

from schemas.settings import SettingsError, Traces
from schemas.trace.record import U16, Claim, TraceError

_FORMAT = b"aurora.claim/1"
_CHECKSUM_BYTES = 16
_S3_CONNECT_S, _S3_REQUEST_S = 2, 10
"""Whoever waits here has other chunks to care for; what failed is tried again with the next one."""


class ClaimStoreError(RuntimeError):
    """The store is away or refuses; the message says which one, why, and what to set."""


class ClaimStore:
    """The files below ``traces.claim_check_uri``. Not thread-safe."""

    def __init__(self, settings: Traces) -> None:
        """Name the store; nothing is connected yet.

        Raises:
            SettingsError: an address or an option that Arrow does not know.
        """
        self._files, self._root, self._uri = _open(settings)
        self._is_local = isinstance(self._files, fs.LocalFileSystem)

    def put(self, features_nF: U16, time_us: int) -> Claim:
        """Keep the features of a chunk that ended at the given time.

        Raises:
            ClaimStoreError: the store did not take them.
        """
        file = _encode(features_nF)
        checksum = _checksum(file)
        folder = datetime.fromtimestamp(time_us / 1e6, UTC).strftime("%Y-%m-%d")
        with self._failures():
            if self._is_local:
                self._files.create_dir(f"{self._root}/{folder}", recursive=True)
            with self._files.open_output_stream(f"{self._root}/{folder}/{checksum}.arrow", compression=None) as stream:
                stream.write(file)
        return Claim(f"{self._uri}/{folder}/{checksum}.arrow", checksum, file.size)

    def get(self, claim: Claim, tokens: int, width: int) -> U16:
        """The features [tokens, width] that a claim names.

        Raises:
            TraceError: there is no such file, or it is not the one that was claimed.
            ClaimStoreError: the store cannot say.
        """
        name = claim.uri.removeprefix(f"{self._uri}/")
        if name == claim.uri or ".." in name.split("/"):
            raise TraceError("claim_foreign", f"{claim.uri} is not below {self._uri} (traces.claim_check_uri)")
        with self._failures():
            try:
                file = self._read(f"{self._root}/{name}", claim.size)
            except FileNotFoundError as error:
                self._check_root()
                raise TraceError("claim_missing", f"no file {claim.uri}") from error
        if file is None or _checksum(file) != claim.checksum:
            raise TraceError("claim_corrupt", f"{claim.uri} is not the file of {claim.size} bytes that was claimed")
        return _decode(file, claim.uri, tokens, width)

    def probe(self) -> None:
        """See that the store takes a file, and delete it again.

        Raises:
            ClaimStoreError: it does not.
        """
        path = f"{self._root}/.probe-{uuid.uuid4().hex}"
        with self._failures():
            if self._is_local:
                self._files.create_dir(self._root, recursive=True)
            with self._files.open_output_stream(path, compression=None) as stream:
                stream.write(b"-")
            self._files.delete_file(path)

    def _read(self, path: str, size: int) -> pa.Buffer | None:
        """The file, if it has the size that it should have."""
        with self._files.open_input_file(path) as file:
            return file.read_buffer() if file.size() == size else None

    def _check_root(self) -> None:
        """A folder or bucket that is gone says nothing about the files that were in it: it may not be mounted."""
        root = self._root if self._is_local else self._root.split("/")[0]
        if self._files.get_file_info(root).type == fs.FileType.NotFound:
            raise FileNotFoundError(f"{root} is not there")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise ClaimStoreError(
                f"{self._uri}: {error}; check traces.claim_check_uri and traces.claim_check_options"
            ) from error


def _open(settings: Traces) -> tuple[fs.FileSystem, str, str]:
    """File system, path of the root in it, and the root's full address."""
    uri, options = settings.claim_check_uri.rstrip("/"), settings.claim_check_options
    scheme, separator, path = uri.partition("://")
    try:
        if scheme == "s3" and separator:
            return _s3(options), path, uri
        if options:
            raise SettingsError(f"traces.claim_check_options: only an s3:// address takes options, not {uri!r}")
        if not separator:
            folder = Path(uri).resolve()
            return fs.LocalFileSystem(), str(folder), folder.as_uri()
        files, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise SettingsError(f"traces.claim_check_uri or traces.claim_check_options: {error}") from error
    return files, root.rstrip("/"), uri


def _s3(options: Mapping[str, str]) -> fs.FileSystem:
    ours = {"connect_timeout": _S3_CONNECT_S, "request_timeout": _S3_REQUEST_S, **options}
    # With a delayed open a file is one request; otherwise it would be an upload in parts, which takes three.
    return fs.S3FileSystem(
        **ours, allow_delayed_open=True, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1)
    )


def _encode(features_nF: U16) -> pa.Buffer:
    rows = np.ascontiguousarray(features_nF, dtype="<u2")
    cells = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])
    batch = pa.record_batch([cells], schema=pa.schema({"features": cells.type}, metadata={b"format": _FORMAT}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _decode(file: pa.Buffer, uri: str, tokens: int, width: int) -> U16:
    try:
        table = pa.ipc.open_file(file).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise TraceError("claim_corrupt", f"{uri}: not an Arrow file: {error}") from error
    wanted = pa.schema({"features": pa.binary(2 * width)})
    found = (table.schema.metadata or {}).get(b"format"), table.num_rows
    if not table.schema.equals(wanted) or found != (_FORMAT, tokens):
        raise TraceError(
            "claim_corrupt", f"{uri}: expected {tokens} rows of {width} features, found {found[1]} of {table.schema}"
        )
    cells = table["features"].combine_chunks()
    bits: U16 = np.frombuffer(cells.buffers()[1], "<u2", tokens * width, cells.offset * 2 * width)
    return bits.reshape(tokens, width)


def _checksum(file: pa.Buffer) -> str:
    return hashlib.blake2b(file, digest_size=_CHECKSUM_BYTES).hexdigest()
