"""Tables and claim checks on a real S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from recorded import conversation, record_of, tables_of

from ops.bench.object_store import KEY, SECRET, CountingProxy, ObjectStore
from pipeline.delta import DeltaLog, TableError
from pipeline.maintenance import Maintenance
from pipeline.offsets import (
    COMMIT_ORDER,
    Batch,
    ConflictError,
    FencedError,
    OffsetCommitter,
    SourcePartition,
    transaction_id,
)
from schemas.batches import TABLES
from schemas.claim_store import ClaimStore, ClaimStoreError
from schemas.settings import Tables, Traces
from schemas.trace.record import TraceError

SOURCE = SourcePartition("traces", 0)


def tables_at(store: ObjectStore, prefix: str, **options: str) -> Tables:
    """Return settings of tables that retain the records of ``recorded``, which are years old."""
    years = {"batches_retention": "36500d", "traces_retention": "36500d"}
    return Tables(uri=f"{store.bucket}/{prefix}", storage_options={**store.options(), **options}, **years)


def batch(offset: int, source: SourcePartition = SOURCE) -> Batch:
    record = record_of(f"request-{offset}", conversation(range(9), 4), offset, partition=source.partition)
    rows = tables_of(record)
    return Batch(source, offset, {name: rows[name] for name in COMMIT_ORDER})


def offsets(rows: pa.Table) -> list[int]:
    return sorted(rows["offset"].to_pylist())


def test_batches_are_committed_fenced_compacted_and_read(object_store: ObjectStore) -> None:
    settings = tables_at(object_store, "fenced")
    log = DeltaLog(settings)
    log.create()
    stale, owner = OffsetCommitter(log), OffsetCommitter(DeltaLog(settings))
    stale.commit([batch(0)])
    owner.commit([batch(1)])
    with pytest.raises(FencedError):
        stale.commit([batch(1)])
    for offset in (2, 3):
        stale.commit([batch(offset)])
    added = log.read_added("accepted", 2, 4)
    done = {of_one.table: of_one for of_one in Maintenance(settings).run()}
    assert not any(of_one.error for of_one in done.values())
    assert (done["accepted"].compacted, done["accepted"].written) == (4, 1)
    assert offsets(log.read("accepted")) == [0, 1, 2, 3]
    assert log.read("accepted").schema == TABLES["accepted"]
    assert log.read_added("accepted", 2, 4).equals(added)
    assert offsets(log.read("accepted", ["offset"], at=2)) == [0, 1]
    assert log.commit_time("accepted", 1)
    assert log.commit_time("accepted", 99) is None
    stale.commit([batch(4)])
    assert log.query("select count(*) as n from accepted").read_all()["n"].to_pylist() == [5]


def test_store_accepts_one_of_two_commits_on_the_same_version(object_store: ObjectStore) -> None:
    settings = tables_at(object_store, "conditional")
    first, second = (DeltaLog(settings).snapshot("accepted") for _ in range(2))
    rows = batch(0).rows["accepted"]
    first.append(rows, {transaction_id("accepted", SOURCE): 0})
    with pytest.raises(ConflictError):
        second.append(rows, {}, retries=0)
    with pytest.raises(FencedError):
        second.append(rows, {transaction_id("accepted", SOURCE): 0})
    assert DeltaLog(settings).row_count("accepted") == 1


@pytest.fixture
def proxy(object_store: ObjectStore, free_port: Callable[[], int]) -> Iterator[CountingProxy]:
    """Count the requests to the store."""
    counting = CountingProxy(free_port(), object_store.port)
    yield counting
    counting.close()


def test_commit_and_poll_take_few_requests(object_store: ObjectStore, proxy: CountingProxy) -> None:
    settings = tables_at(object_store, "counted", **object_store.options(proxy.port))
    log, reader = DeltaLog(settings), DeltaLog(settings)
    log.create()
    sources = [SourcePartition("traces", partition) for partition in range(6)]
    committer = OffsetCommitter(log)
    for offset in range(8):
        proxy.take_requests()
        committer.commit([batch(offset, source) for source in sources])
    assert len(proxy.take_requests()) == 18, "six for each table with rows"
    newest = {name: reader.version(name) for name in ("accepted", "rejected")}
    assert reader.oldest_readable("accepted") == 0
    proxy.take_requests()
    assert {name: reader.version(name) for name in newest} == newest
    assert len(proxy.take_requests()) == 4


def test_overtaken_commit_uploads_its_data_once(object_store: ObjectStore, proxy: CountingProxy) -> None:
    settings = tables_at(object_store, "overtaken", **object_store.options(proxy.port))
    log = DeltaLog(settings)
    log.create()
    slow, fast = OffsetCommitter(log), OffsetCommitter(DeltaLog(settings))
    other = SourcePartition("traces", 1)
    slow.commit([batch(0)])
    for offset in range(5):
        fast.commit([batch(offset, other)])
    proxy.take_requests()
    slow.commit([batch(1)])
    requests = proxy.take_requests()
    assert sum(request.uploads_data for request in requests) == 3
    assert offsets(log.read("accepted", ["offset"])) == [0, 0, 1, 1, 2, 3, 4]


def test_rejected_key_names_the_setting(object_store: ObjectStore) -> None:
    with pytest.raises(TableError, match=r"tables\.storage_options"):
        DeltaLog(tables_at(object_store, "refused", AWS_SECRET_ACCESS_KEY="another")).version("traces")


def test_claim_checks_are_written_and_read(object_store: ObjectStore) -> None:
    options = {
        "endpoint_override": object_store.options()["AWS_ENDPOINT_URL"],
        "access_key": KEY,
        "secret_key": SECRET,
        "region": "us-east-1",
    }
    settings = Traces(claim_check_uri=f"{object_store.bucket}/claims", claim_check_options=options)
    features = np.arange(24, dtype=np.uint16).reshape(4, 6)
    claim = ClaimStore(settings).put(features, 0)
    assert np.array_equal(ClaimStore(settings).get(claim, 4, 6), features)
    with pytest.raises(TraceError, match="claim_missing"):
        ClaimStore(settings).get(replace(claim, uri=f"{claim.uri}-gone"), 4, 6)
    refused = settings.model_copy(update={"claim_check_options": {**options, "secret_key": "another"}})
    with pytest.raises(ClaimStoreError, match=r"traces\.claim_"):
        ClaimStore(refused).get(claim, 4, 6)
