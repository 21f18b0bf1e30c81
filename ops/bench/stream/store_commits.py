"""Commits to tables in an object store: requests, uploads, and how throughput grows with the number of workers.

The committers of the workers run as threads over synthetic records that are built beforehand, because the store is
measured and not this machine. A proxy counts their requests. It makes every upload of a data file take longer, as it
does over a network.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from ops.bench.embedded_kafka import free_port
from ops.bench.harness import Figure, Goal, Say, TrialValues
from ops.bench.object_store import CountingProxy, ObjectStore
from ops.bench.stream.recorded_messages import TraceMessage, build_messages
from pipeline.batches import Record, build
from pipeline.delta import DeltaLog
from pipeline.offsets import COMMIT_ORDER, Batch, OffsetCommitter, SourcePartition
from schemas.settings import Tables
from schemas.trace.record import Chunk, Envelope, VerifyStep

FIGURE_NAMES = ("requests_per_commit_6_partitions", "uploads_per_commit_8_workers", "scaling_8_workers_s3")
_PARTITIONS = 6
_WORKERS = 8
_COMMITS = 50
_UPLOAD_S = 0.3
_REQUESTS = 8
_MESSAGE_BYTES = 64 << 10
_TOKENS, _VOCABULARY, _WIDTH, _TOP_K = 60, 1000, 576, 4
_FINITE_BF16 = 0x7F80
_TIME_US = 1_700_000_000_000_000
_GOALS = (Goal(20, at_least=False), Goal(1, at_least=False), Goal(6, at_least=True))

Rows = Mapping[str, pa.Table]


@dataclass(frozen=True, slots=True)
class CommitRun:
    """Some workers that made some commits each, each to a partition of its own."""

    commits: int
    seconds: float
    uploads: int
    """Data files that were written."""
    data_files: int
    """Data files in the tables."""

    @property
    def per_s(self) -> float:
        """Commits per second of all workers."""
        return self.commits / self.seconds


def measure(trials: int, say: Say) -> Iterator[Figure]:
    """Measure all figures at an S3 server.

    Args:
        trials: How often the commits of one worker and of all workers are measured, in turn.
        say: Reports progress.

    Raises:
        UserError: no S3 server is installed.
        StartError: it did not start.
    """
    requests = [_make_request(number) for number in range(_REQUESTS)]
    rows = [_build(message) for message in build_messages(requests, _MESSAGE_BYTES, _REQUESTS * _MESSAGE_BYTES)]
    with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder:
        store = ObjectStore(Path(folder), free_port)
        store.start()
        try:
            yield _count_requests(store, rows, say)
            yield from _scale(store, rows, trials, say)
        finally:
            store.stop()


def _count_requests(store: ObjectStore, rows: Sequence[Rows], say: Say) -> Figure:
    """Count the requests of commits with rows of several partitions, after a first one that opens the tables."""
    sources = [SourcePartition("bench", partition) for partition in range(_PARTITIONS)]
    with _proxy_of(store) as proxy, ThreadPoolExecutor(len(COMMIT_ORDER) - 1) as pool:
        log = DeltaLog(_tables_at(store, proxy, "requests"))
        log.create()
        proxy.take_requests()
        committer = OffsetCommitter(log, pool)
        tables = 0
        for offset in range(_COMMITS + 1):
            if offset == 1:
                first = len(proxy.take_requests())
            batches = [_batch(source, offset, rows[(offset + source.partition) % len(rows)]) for source in sources]
            tables = len(committer.commit(batches))
        requests = proxy.take_requests()
    say(f"{len(requests) / _COMMITS:.1f} requests per commit of {_PARTITIONS} partitions, the first one {first}")
    detail = {"commits": _COMMITS, "tables_per_commit": tables, "first_commit": first}
    return Figure(FIGURE_NAMES[0], len(requests) / _COMMITS, goal=_GOALS[0], detail=detail)


def _scale(store: ObjectStore, rows: Sequence[Rows], trials: int, say: Say) -> Iterator[Figure]:
    """Compare the commits per second of one worker with those of several."""
    runs: dict[int, list[CommitRun]] = {1: [], _WORKERS: []}
    for trial in range(trials):
        for workers in (1, _WORKERS) if trial % 2 == 0 else (_WORKERS, 1):
            run = _run_workers(store, rows, workers, f"scaling-{trial}-{workers}")
            runs[workers].append(run)
            say(f"{workers} workers: {run.per_s:.2f} commits/s, {run.uploads} uploads of {run.data_files} data files")
    all_workers = runs[_WORKERS]
    uploads = sum(run.uploads for run in all_workers) / sum(run.data_files for run in all_workers)
    detail = {"commits": sum(run.commits for run in all_workers), "upload_s": _UPLOAD_S}
    yield Figure(FIGURE_NAMES[1], uploads, goal=_GOALS[1], detail=detail)
    rates = {workers: TrialValues(tuple(run.per_s for run in of)) for workers, of in runs.items()}
    per_s = {f"commits_per_s_{workers}": round(rate.median, 2) for workers, rate in rates.items()}
    ratios = rates[_WORKERS].over(rates[1])
    detail = {**per_s, "upload_s": _UPLOAD_S}
    yield Figure(FIGURE_NAMES[2], ratios.median, goal=_GOALS[2], ratios=ratios, detail=detail)


def _run_workers(store: ObjectStore, rows: Sequence[Rows], workers: int, prefix: str) -> CommitRun:
    commits = _COMMITS // _WORKERS + 2
    with _proxy_of(store, _UPLOAD_S) as proxy, ThreadPoolExecutor(workers) as pool:
        tables = _tables_at(store, proxy, prefix)
        DeltaLog(tables).create()

        def work(partition: int) -> None:
            source = SourcePartition("bench", partition)
            with ThreadPoolExecutor(len(COMMIT_ORDER) - 1) as own:
                committer = OffsetCommitter(DeltaLog(tables), own)
                for offset in range(committer.next_offset(source), commits):
                    committer.commit([_batch(source, offset, rows[(offset + partition) % len(rows)])])

        proxy.take_requests()
        started = time.perf_counter()
        for done in [pool.submit(work, partition) for partition in range(workers)]:
            done.result()
        seconds = time.perf_counter() - started
        uploads = sum(request.uploads_data for request in proxy.take_requests())
        log = DeltaLog(tables)
        return CommitRun(commits * workers, seconds, uploads, sum(len(log.file_sizes(name)) for name in COMMIT_ORDER))


def _make_request(number: int) -> Chunk:
    """Return a request as if it had been recorded: random tokens and features, a prompt and single-token steps."""
    rng = np.random.default_rng(number)
    tokens = [int(token) for token in rng.integers(0, _VOCABULARY, _TOKENS + 1)]
    steps = []
    for step, (token, bonus) in enumerate(pairwise(tokens)):
        top_ids = rng.choice(_VOCABULARY, (1, _TOP_K), replace=False).astype(np.int32)
        steps.append(
            VerifyStep(
                verify_step=step,
                position=step,
                tokens=(token,),
                features=rng.integers(0, _FINITE_BF16, (1, _WIDTH), dtype=np.uint16),
                draft_tokens=(),
                draft_parents=(),
                draft_logprobs=(),
                accepted=(),
                bonus=bonus,
                top_ids=top_ids,
                top_logprobs=np.log(np.full((1, _TOP_K), 0.2, np.float32)),
                speculator="",
                draft_us=0,
                verify_us=0,
                time_us=_TIME_US + step,
            )
        )
    envelope = Envelope(
        request=f"request-{number}",
        chunk=0,
        last=True,
        node="bench",
        target="target",
        line="bench",
        features="inline",
        feature_width=_WIDTH,
        top_k=_TOP_K,
        temperature=0.0,
        top_p=1.0,
    )
    return Chunk(envelope, tuple(steps))


def _build(message: TraceMessage) -> Rows:
    headers = tuple((name, v if isinstance(v, bytes) else str(v).encode()) for name, v in message.headers)
    return build([Record("bench", 0, 0, time.time_ns() // 1000, message.key, message.value, headers)], 32).rows


def _batch(source: SourcePartition, offset: int, rows: Rows) -> Batch:
    """Return the rows of one record as those of another offset and partition."""
    return Batch(source, offset, {name: _move(table, source, offset) for name, table in rows.items()})


def _move(table: pa.Table, source: SourcePartition, offset: int) -> pa.Table:
    for name, value in (("partition", source.partition), ("offset", offset)):
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema[at], pa.array([value] * table.num_rows, table.schema[at].type))
    return table


@contextmanager
def _proxy_of(store: ObjectStore, upload_s: float = 0.0) -> Iterator[CountingProxy]:
    proxy = CountingProxy(free_port(), store.port, upload_s)
    try:
        yield proxy
    finally:
        proxy.close()


def _tables_at(store: ObjectStore, proxy: CountingProxy, prefix: str) -> Tables:
    return Tables(uri=f"{store.bucket}/{prefix}", storage_options=store.options(proxy.port))
