"""Claim checks: the features of a trace chunk in a file of an object store, referenced by URI and checksum.

The file is a zstd-compressed Arrow IPC file with one row per token of the chunk. Its name is its checksum and its
folder is the UTC day: no part of the path comes from a client, and a day can be deleted as a whole. The store is
accessed through ``pyarrow.fs``, so it can be a local folder, S3, or any other file system of Arrow.
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
_S3_CONNECT_TIMEOUT_S, _S3_REQUEST_TIMEOUT_S = 2, 10
"""A caller has other chunks to process and retries with the next one."""


class ClaimStoreError(RuntimeError):
    """The store is unreachable or rejects a request; the message names the store, the reason and the settings."""


class ClaimStore:
    """The files below ``traces.claim_check_uri``. Not thread-safe."""

    def __init__(self, settings: Traces) -> None:
        """Open the store without connecting to it.

        Raises:
            SettingsError: Arrow does not support the URI or an option.
        """
        self._filesystem, self._root, self._uri = _open(settings)
        self._is_local = isinstance(self._filesystem, fs.LocalFileSystem)

    def put(self, features_nF: U16, time_us: int) -> Claim:
        """Store the features of a chunk; ``time_us`` is the time of its last verify step.

        Raises:
            ClaimStoreError: the store did not accept the file.
        """
        file = _encode(features_nF)
        checksum = _checksum(file)
        folder = datetime.fromtimestamp(time_us / 1e6, UTC).strftime("%Y-%m-%d")
        with self._explained_errors():
            if self._is_local:
                self._filesystem.create_dir(f"{self._root}/{folder}", recursive=True)
            path = f"{self._root}/{folder}/{checksum}.arrow"
            with self._filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(file)
        return Claim(f"{self._uri}/{folder}/{checksum}.arrow", checksum, file.size)

    def get(self, claim: Claim, tokens: int, width: int) -> U16:
        """Return the features [tokens, width] of a claim.

        Raises:
            TraceError: the file does not exist, or its content does not match the claim.
            ClaimStoreError: the store is unreachable.
        """
        name = claim.uri.removeprefix(f"{self._uri}/")
        if name == claim.uri or ".." in name.split("/"):
            raise TraceError("claim_foreign", f"{claim.uri} is not below {self._uri} (traces.claim_check_uri)")
        with self._explained_errors():
            try:
                file = self._read(f"{self._root}/{name}", claim.size)
            except FileNotFoundError as error:
                self._check_root()
                raise TraceError("claim_missing", f"no file {claim.uri}") from error
        if file is None or _checksum(file) != claim.checksum:
            raise TraceError("claim_corrupt", f"{claim.uri} does not have the claimed checksum and {claim.size} bytes")
        return _decode(file, claim.uri, tokens, width)

    def probe(self) -> None:
        """Write a file to the store and delete it again.

        Raises:
            ClaimStoreError: the store did not accept the file.
        """
        path = f"{self._root}/.probe-{uuid.uuid4().hex}"
        with self._explained_errors():
            if self._is_local:
                self._filesystem.create_dir(self._root, recursive=True)
            with self._filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(b"-")
            self._filesystem.delete_file(path)

    def _read(self, path: str, size: int) -> pa.Buffer | None:
        """Return the content of a file; None if it has another size."""
        with self._filesystem.open_input_file(path) as file:
            return file.read_buffer() if file.size() == size else None

    def _check_root(self) -> None:
        """Raise if the root folder or bucket is missing: it may not be mounted, so its files may still exist."""
        root = self._root if self._is_local else self._root.split("/")[0]
        if self._filesystem.get_file_info(root).type == fs.FileType.NotFound:
            raise FileNotFoundError(f"{root} does not exist")

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            settings = "traces.claim_check_uri and traces.claim_check_options"
            raise ClaimStoreError(f"{self._uri}: {error}; check {settings}") from error


def _open(settings: Traces) -> tuple[fs.FileSystem, str, str]:
    """Return the file system, the path of the root in it, and the root's URI."""
    uri, options = settings.claim_check_uri.rstrip("/"), settings.claim_check_options
    scheme, separator, path = uri.partition("://")
    try:
        if scheme == "s3" and separator:
            return _s3(options), path, uri
        if options:
            raise SettingsError(f"traces.claim_check_options: only an s3:// URI takes options, not {uri!r}")
        if not separator:
            folder = Path(uri).resolve()
            return fs.LocalFileSystem(), str(folder), folder.as_uri()
        filesystem, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise SettingsError(f"traces.claim_check_uri or traces.claim_check_options: {error}") from error
    return filesystem, root.rstrip("/"), uri


def _s3(options: Mapping[str, str]) -> fs.FileSystem:
    timeouts = {"connect_timeout": _S3_CONNECT_TIMEOUT_S, "request_timeout": _S3_REQUEST_TIMEOUT_S}
    # With a delayed open a file takes one request; otherwise it is a multipart upload, which takes three.
    return fs.S3FileSystem(
        **{**timeouts, **options},
        allow_delayed_open=True,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


def _encode(features_nF: U16) -> pa.Buffer:
    rows = np.ascontiguousarray(features_nF, dtype="<u2")
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])
    batch = pa.record_batch([column], schema=pa.schema({"features": column.type}, metadata={b"format": _FORMAT}))
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
    expected = pa.schema({"features": pa.binary(2 * width)})
    found = (table.schema.metadata or {}).get(b"format"), table.num_rows
    if not table.schema.equals(expected) or found != (_FORMAT, tokens):
        raise TraceError(
            "claim_corrupt", f"{uri}: expected {tokens} rows of {width} features, found {found[1]} of {table.schema}"
        )
    column = table["features"].combine_chunks()
    bits: U16 = np.frombuffer(column.buffers()[1], "<u2", tokens * width, column.offset * 2 * width)
    return bits.reshape(tokens, width)


def _checksum(file: pa.Buffer) -> str:
    return hashlib.blake2b(file, digest_size=_CHECKSUM_BYTES).hexdigest()
