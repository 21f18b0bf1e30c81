"""One campaign against the stream: traffic, workers, faults, and one comparison with the ledger at its end."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import SIGKILL
from threading import Event

from comparison import Verdict, compare
from deltalake import DeltaTable
from lives import NOTHING, PATIENCE_S, Worker
from stream_worker import Publisher, rows_of_records, wait_until
from traffic import HARMS, Traffic

from pipeline import topics
from pipeline.delta import DeltaLog
from pipeline.offsets import COMMIT_ORDER, SourcePartition, transaction_id
from schemas.settings import Settings

HARMED_SHARE = 0.02
FAULTS = (
    "worker killed",
    "of these between the commits of two tables",
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
    *HARMS,
    "clock jumped",
    "node with a wrong clock",
)


@dataclass
class Tally:
    """What the campaigns of a run injected, and what came of it."""

    faults: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FAULTS, 0)))
    workers: Counter[str] = field(default_factory=Counter)
    """What the workers counted."""
    rows: Counter[str] = field(default_factory=Counter)
    """Sums of the verdicts."""

    def line(self) -> str:
        """All of it in one line."""
        workers, rows = self.workers, self.rows
        return (
            f"faults: {', '.join(f'{name} {number:,}' for name, number in self.faults.items())}; "
            f"workers: {workers['lives']:,} lives, {workers['ended by themselves']:,} ended by themselves, "
            f"{workers['fenced']:,} commits fenced; "
            f"{workers['records_deferred']:,} records came ahead of their turn and were fetched again by "
            f"{workers['seeks']:,} seeks back; "
            f"rows published {rows['rows_published']:,}, rows in the table {rows['rows_in_table']:,}, "
            f"dead letters {rows['dead_letters']:,} with {rows['rows_in_dead_letters']:,} rows, "
            f"lost {rows['lost']:,}, doubled {rows['doubled']:,}"
        )


class Campaign:
    """A topic and tables of its own, with the traffic into them."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        tally: Tally,
        say: Callable[[str], None],
        harmed_share: float = HARMED_SHARE,
        clocks: Sequence[int] = (0,),
    ) -> None:
        """Make the topic.

        Args:
            settings: What the test sees; a worker may be given other ones, as the address of a proxy.
            folder: For logs.
            tally: Gets the counts of this campaign in the end.
            say: Shows progress.
            harmed_share: Share of the messages that are broken, doubled or exchanged.
            clocks: For each node how far its clock is off, in milliseconds.
        """
        self.settings = settings
        self.faults: Counter[str] = Counter()
        self.random = random.Random(0)
        self._folder, self._tally, self._say = folder, tally, say
        self._workers: list[Worker] = []
        topics.create(settings.kafka)
        self._tables = DeltaLog(settings.tables)
        self._publisher = Publisher(settings)
        self._traffic = Traffic(self._publisher, harmed_share, clocks)

    @property
    def harmed(self) -> Counter[str]:
        """Messages that did not arrive as they were meant."""
        return self._traffic.harmed

    def inject(self, fault: str) -> None:
        """Count a fault that was injected, and say so."""
        self.faults[fault] += 1
        self._say(f"{fault} {self.faults[fault]}")

    @contextmanager
    def worker(self, settings: Settings | None = None, variables: Mapping[str, str] = NOTHING) -> Iterator[Worker]:
        """A worker that is started again whenever it ends, until the block does."""
        number = len(self._workers)
        alive = Worker(settings or self.settings, self._folder / f"worker-{number}.log", variables)
        self._workers.append(alive)
        try:
            yield alive
        finally:
            alive.end(SIGKILL)

    @contextmanager
    def publishing(self, requests: int, pause_s: float = 0.02) -> Iterator[None]:
        """Traffic beside the faults: until the block ends, and until so many requests were sent."""
        over = Event()

        def publish() -> None:
            sent = 0
            while sent < requests or not over.is_set():
                self._traffic.send_request()
                sent += 1
                over.wait(pause_s)
            self._traffic.close()

        with ThreadPoolExecutor(1) as threads:
            done = threads.submit(publish)
            try:
                yield
            finally:
                over.set()
                done.result()

    def torn(self) -> bool:
        """Whether the tables contain the records of a partition up to different offsets."""
        topic = self.settings.kafka.traces_topic
        address = self.settings.tables.uri.rstrip("/")
        tables = {name: DeltaTable(f"{address}/{name}") for name in COMMIT_ORDER}
        sources = [SourcePartition(topic, partition) for partition in range(self.settings.kafka.partitions)]
        return any(
            len({table.transaction_version(transaction_id(name, source)) for name, table in tables.items()}) > 1
            for source in sources
        )

    def settle(self) -> None:
        """Block until the tables hold as many records as were published."""
        wanted = len(self._publisher.ledger.records)
        self._say(f"published {wanted:,} records")

        def stored() -> bool:
            return rows_of_records(self._tables) >= wanted

        assert wait_until(stored, PATIENCE_S + wanted / 20), self._why(wanted)
        self._say("all are in the tables")
        time.sleep(1)  # for what would come twice

    def conclude(self) -> Verdict:
        """Compare tables and ledger row by row, when the workers were ended.

        Raises:
            AssertionError: a row is missing, too many, or another one than was published.
        """
        workers: Counter[str] = Counter()
        for ended in self._workers:
            workers.update(ended.counts)
        verdict = compare(self._publisher.ledger, self.settings)
        faults = self.faults + self.harmed
        self._tally.faults.update(faults)
        self._tally.workers.update(workers)
        self._tally.rows.update(asdict(verdict))
        self._say(f"{verdict}, workers: {dict(workers)}")
        assert (verdict.lost, verdict.doubled) == (0, 0), f"{verdict}, after {dict(faults)}"
        assert verdict.rows_published == verdict.rows_in_table + verdict.rows_in_dead_letters
        return verdict

    def _why(self, wanted: int) -> str:
        logs = "".join(ended.log.read_text()[-5_000:] for ended in self._workers)
        return f"{rows_of_records(self._tables)} of {wanted} records are in the tables\n{logs}"
