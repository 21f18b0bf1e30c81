"""Whether the store of the tables confirms one of several commits on the same version.

A commit to a Delta table creates the file of its version, if no other commit has created it. A store that ignores this
condition (S3's header ``If-None-Match``) confirms two commits and keeps one: the rows of the other are gone, and the
fence of the exactly-once protocol is open. Its answers do not show it, so the probe commits to a table of its own, from
several handles at once. The library lists the newest version before it commits, so commits one after the other would
not reach the condition.
"""

from __future__ import annotations

import shutil
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.fs import DeltaStorageHandler
from pyarrow.fs import PyFileSystem

from pipeline.delta import TableError, store_options, table_address, translate_errors
from schemas.settings import Tables

WRITERS = 6
_SCHEMA = pa.schema([pa.field("probe", pa.int64())])


class UnsafeStoreError(TableError):
    """The store confirms several commits of one version."""


def check_store(settings: Tables) -> None:
    """Commit at once from several handles to a table that is deleted afterwards.

    Raises:
        UnsafeStoreError: the store confirmed more than one commit.
        TableError: the store failed, or these credentials may not write.
    """
    name, options = f"_probe-{uuid.uuid4().hex}", store_options(settings)
    address = table_address(settings.uri, name)
    begin = threading.Barrier(WRITERS)

    def commit(table: DeltaTable) -> bool:
        begin.wait()
        try:
            table.create_write_transaction(
                [], mode="append", schema=table.schema(), commit_properties=CommitProperties(max_commit_retries=0)
            )
        except CommitFailedError:
            return False
        return True

    with translate_errors(f"the store at {settings.uri}"):
        try:
            DeltaTable.create(address, _SCHEMA, storage_options=options)
            with ThreadPoolExecutor(WRITERS, "probe") as pool:
                handles = list(pool.map(lambda _: DeltaTable(address, storage_options=options), range(WRITERS)))
                confirmed = sum(pool.map(commit, handles))
        finally:
            if "://" in settings.uri:
                with suppress(OSError):
                    PyFileSystem(DeltaStorageHandler(table_address(settings.uri, ""), options)).delete_dir(name)
            else:
                shutil.rmtree(address, ignore_errors=True)
    if confirmed > 1:
        raise UnsafeStoreError(
            f"the store at {settings.uri} (tables.uri) confirmed {confirmed} commits of one version and kept one: it "
            f"ignores the header If-None-Match, and rows would be lost. Use a store with conditional writes, and no "
            f"proxy that removes the header"
        )
