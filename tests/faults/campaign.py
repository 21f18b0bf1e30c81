"""A fault campaign against the stream: traffic, workers, faults, and a comparison of the tables with the ledger."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from signal import SIGKILL
from threading import Event

from comparison import ComparisonResult, compare
from deltalake import DeltaTable
from restarted_worker import NO_VARIABLES, TIMEOUT_S, RestartedWorker
from stream_worker import Ledger, Publisher, rows_of_records, transactional_publisher, wait_until
from traffic import MESSAGE_FAULTS, Traffic

from pipeline import topics
from pipeline.delta import DeltaLog
from pipeline.offsets import COMMIT_ORDER, LAST_TABLE, SourcePartition, transaction_id
from schemas.settings import Settings
from schemas.trace.record import Chunk

FAULT_RATIO = 0.02
FAULTS = (
    "worker killed",
    "worker killed between the commits of two tables",
    "second worker joined",
    "second worker left",
    "first worker frozen",
    "broker restarted",
    "one broker of three killed",
    "store refused",
    "store silent",
    "store slow",
    "store cut off",
    "answer to a commit lost",
    "disk full",
    *MESSAGE_FAULTS,
    "clock jumped",
    "node with a wrong clock",
    "transaction committed",
    "transaction aborted",
    "record that decompresses to a gigabyte",
    "record that ends every worker",
)


@dataclass
class Tally:
    """Injected faults and results of all campaigns of a run."""

    faults: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FAULTS, 0)))
    workers: Counter[str] = field(default_factory=Counter)
    """Sums of the counters of the workers."""
    rows: Counter[str] = field(default_factory=Counter)
    """Sums of the comparison results."""

    def line(self) -> str:
        """Return all totals in one line."""
        workers, rows = self.workers, self.rows
        return (
            f"faults: {', '.join(f'{name} {number:,}' for name, number in self.faults.items())}; "
            f"workers: {workers['starts']:,} starts, {workers['unexpected exits']:,} unexpected exits, "
            f"{workers['fenced']:,} commits fenced; "
            f"{workers['records_deferred']:,} records deferred, "
            f"{workers['seeks']:,} seeks; "
            f"rows published {rows['rows_published']:,}, rows in the table {rows['rows_in_table']:,}, "
            f"dead letters {rows['dead_letters']:,} with {rows['rows_in_dead_letters']:,} rows, "
            f"lost {rows['lost']:,}, duplicated {rows['duplicated']:,}"
        )


@contextmanager
def _running(work: Callable[[], None], over: Event) -> Iterator[None]:
    """Run ``work`` on a thread while the block runs; at its end set ``over``, wait, and raise the thread's error."""
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(work)
        try:
            yield
        finally:
            over.set()
            done.result()


class Campaign:
    """A topic and tables, with the traffic into them."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        tally: Tally,
        say: Callable[[str], None],
        fault_ratio: float = FAULT_RATIO,
        clocks: Sequence[int] = (0,),
    ) -> None:
        """Create the topic.

        Args:
            settings: Settings of the test. A worker may have others, such as the address of a proxy.
            folder: For logs.
            tally: Receives the counts of this campaign at its end.
            say: Prints progress.
            fault_ratio: Ratio of the messages that are corrupted, duplicated or reordered.
            clocks: Offset of the clock of each node, in milliseconds.
        """
        self.settings = settings
        self.faults: Counter[str] = Counter()
        self.random = random.Random(0)
        self._folder, self._tally, self._say = folder, tally, say
        self._workers: list[RestartedWorker] = []
        topics.create(settings.kafka)
        self._tables = DeltaLog(settings.tables)
        self._publisher = Publisher(settings)
        self._traffic = Traffic(self._publisher, fault_ratio, clocks)

    @property
    def message_faults(self) -> Counter[str]:
        """Number of faulty messages by fault."""
        return self._traffic.message_faults

    @property
    def ledger(self) -> Ledger:
        """The records that the broker acknowledged."""
        return self._publisher.ledger

    def inject(self, fault: str) -> None:
        """Count and print an injected fault."""
        self.faults[fault] += 1
        self._say(f"{fault} {self.faults[fault]}")

    @contextmanager
    def worker(
        self, settings: Settings | None = None, variables: Mapping[str, str] = NO_VARIABLES, before: str = ""
    ) -> Iterator[RestartedWorker]:
        """Run a worker, and restart it whenever it ends, until the block ends. ``before`` is as for ``worker``."""
        number = len(self._workers)
        worker = RestartedWorker(settings or self.settings, self._folder / f"worker-{number}.log", variables, before)
        self._workers.append(worker)
        try:
            yield worker
        finally:
            worker.end(SIGKILL)

    @contextmanager
    def publishing(self, requests: int, pause_s: float = 0.02) -> Iterator[None]:
        """Publish requests until the block ends, and at least ``requests`` of them."""
        over = Event()

        def publish() -> None:
            sent = 0
            while sent < requests or not over.is_set():
                self._traffic.send_request()
                sent += 1
                over.wait(pause_s)
            self._traffic.close()

        with _running(publish, over):
            yield

    def send_poison(self, fault: str, made: Chunk, value: bytes, reason: str) -> None:
        """Send a record under the key and headers of a chunk. It becomes a dead letter with a reason."""
        self._publisher.send(made, value, reason)
        self.inject(fault)

    @contextmanager
    def transactions(self, pause_s: float = 0.1) -> Iterator[None]:
        """Publish one transaction after the other until the block ends. Every second one is aborted."""
        over = Event()
        publisher = transactional_publisher(self.settings)

        def publish() -> None:
            for number in count():
                aborted = number % 2 == 1
                with publisher.transaction(abort=aborted):
                    publisher.send_many(range(5 * number, 5 * number + 5))
                self.faults["transaction aborted" if aborted else "transaction committed"] += 1
                if over.wait(pause_s):
                    return

        try:
            with _running(publish, over):
                yield
        finally:
            self.ledger.records += publisher.ledger.records

    def has_torn_commit(self) -> bool:
        """Return whether a table is ahead of ``accepted``, which is committed last."""
        topic = self.settings.kafka.traces_topic
        address = self.settings.tables.uri.rstrip("/")
        tables = {name: DeltaTable(f"{address}/{name}") for name in COMMIT_ORDER}
        sources = [SourcePartition(topic, partition) for partition in range(self.settings.kafka.partitions)]
        ends = {
            (name, source): table.transaction_version(transaction_id(name, source)) or -1
            for name, table in tables.items()
            for source in sources
        }
        return any(end > ends[LAST_TABLE, source] for (_, source), end in ends.items())

    def settle(self) -> None:
        """Block until the tables contain all published records."""
        wanted = len(self._publisher.ledger.records)
        self._say(f"published {wanted:,} records")

        def stored() -> bool:
            return rows_of_records(self._tables) >= wanted

        assert wait_until(stored, TIMEOUT_S + wanted / 20), self._why(wanted)
        self._say("all are in the tables")
        time.sleep(1)  # to detect duplicates

    def conclude(self) -> ComparisonResult:
        """Compare tables and ledger row by row, after the workers have ended.

        Raises:
            AssertionError: a row is missing, duplicated or different.
        """
        workers: Counter[str] = Counter()
        for ended in self._workers:
            workers.update(ended.counts)
        result = compare(self._publisher.ledger, self.settings)
        faults = self.faults + self.message_faults
        self._tally.faults.update(faults)
        self._tally.workers.update(workers)
        self._tally.rows.update(asdict(result))
        self._say(f"{result}, workers: {dict(workers)}")
        assert (result.lost, result.duplicated) == (0, 0), f"{result}, after {dict(faults)}"
        assert result.rows_published == result.rows_in_table + result.rows_in_dead_letters
        return result

    def _why(self, wanted: int) -> str:
        logs = "".join(ended.log.read_text()[-5_000:] for ended in self._workers)
        return f"{rows_of_records(self._tables)} of {wanted} records are in the tables\n{logs}"
