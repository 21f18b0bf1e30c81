"""``aurora bench soak``: the real parts under load for a long time, with what goes wrong in production.

A node as a process of its own, a registry and a broker; clients of whom some hang up; another version under the alias
every few seconds; the broker stopped and started twice. Afterwards no request may have failed, memory must be where it
was, and every captured trace row must be accounted for: in the topic, or counted as shed.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from statistics import linear_regression, median

import psutil

from ops.bench import embedded_kafka, speculator
from ops.bench.clients import TIMEOUT_S, soak_requests
from ops.bench.harness import Figure, Goal, Report, Session
from ops.loadgen.load import Load
from ops.local.kafka import Broker
from ops.local.mlflow_server import RegistryServer
from ops.local.parts import is_answering
from ops.local.process import Process
from ops.local.stack import Say, provide_target
from schemas.errors import UserError
from schemas.settings import Kafka, Registry, Settings, to_environ
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft
from schemas.status import ServeStatus
from trainer.data.target import Target, read_target
from trainer.release.registry import SpeculatorRegistry

_OUTAGES = (0.3, 0.6)
_LONGEST_OUTAGE_S = 30.0
_OUTAGE_SHARE = 0.1
_SAMPLE_S = 2.0
_SETTLED = 1 / 3
"""Of the time: memory is looked at after it, when every cache has been filled once."""
_READY_S = 120.0
_SETTLE_S = 120.0
_TICK_S = 0.2
_TOLD_S = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    minutes: float
    concurrency: int
    swap_every_s: float
    leaving: float
    speculator: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of the node at a time, in seconds since the load began."""

    seconds: float
    resident: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a soak left."""

    load: Load
    status: ServeStatus
    rows_in_topic: int
    memory: tuple[Memory, ...]
    exit_code: int


def run(settings: Settings, options: Options, say: Say) -> Report:
    """Soak.

    Raises:
        UserError: no target, no such speculator, or the node ended.
        StartError: a part did not come up.
    """
    session = Session(settings.serve.num_threads)
    provide_target(settings.target, say)
    target = read_target(settings)
    trained = speculator.load_speculator(settings, options.speculator, target.line)
    folder = Path(settings.stack.data_dir) / "bench" / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with _parts(settings, folder, say) as (node, broker, here):
        registry = SpeculatorRegistry(here.registry)
        versions = _register(registry, target, trained)
        outcome = Soak(here, options, node, broker, registry, versions, target.line, say).run()
    about = {"options": asdict(options), "logs": str(folder)}
    title = f"soak of {options.minutes:g} minutes"
    return session.report(title, about, judge(outcome, options))


class Soak:
    """One soak over parts that run."""

    def __init__(
        self,
        settings: Settings,
        options: Options,
        node: Process,
        broker: Broker,
        registry: SpeculatorRegistry,
        versions: Sequence[str],
        line: str,
        say: Say,
    ) -> None:
        self._settings, self._options, self._say = settings, options, say
        self._node, self._broker, self._registry = node, broker, registry
        self._versions, self._line = cycle(versions), line
        self._seconds = options.minutes * 60
        self._outage = min(_LONGEST_OUTAGE_S, _OUTAGE_SHARE * self._seconds)
        requests = soak_requests(settings.target.served_model_name, options.leaving)
        self._load = Load(node_url(settings), requests, options.concurrency, timeout_s=TIMEOUT_S)
        self._memory: list[Memory] = []

    def run(self) -> Outcome:
        """Load the node, disturb it, let it settle, end it, and count."""
        self._load.start()
        self._disturb()
        self._say("no further requests; waiting for the last answers and traces")
        self._load.stop()
        self._load.wait()
        status = self._settled()
        self._node.stop()
        rows, code = rows_in_topic(self._settings.kafka), self._node.exit_code
        assert code is not None, "a stopped process has an exit code"
        return Outcome(self._load, status, rows, tuple(self._memory), code)

    def _disturb(self) -> None:
        """Another version, a broker that goes and comes back, and a look at the memory, each at its time."""
        began, away_since = time.monotonic(), None
        outages = [share * self._seconds for share in _OUTAGES]
        swap_at = sample_at = 0.0
        told_at = _TOLD_S
        process = psutil.Process(self._node.pid)
        while (now := time.monotonic() - began) < self._seconds:
            if not self._node.alive:
                raise UserError(f"the node ended with code {self._node.exit_code}; read {self._node.log}")
            if now >= swap_at:
                self._registry.set_alias(self._line, "champion", next(self._versions))
                swap_at = now + self._options.swap_every_s
            if now >= sample_at:
                self._memory.append(Memory(now, process.memory_info().rss))
                sample_at = now + _SAMPLE_S
            if away_since is None and outages and now >= outages[0]:
                self._say(f"stopping the broker for {self._outage:.0f} s")
                self._broker.stop()
                outages.pop(0)
                away_since = now
            if away_since is not None and now >= away_since + self._outage:
                self._broker.start()
                away_since = None
                self._say("the broker is back")
            if now >= told_at:
                self._tell(now)
                told_at = now + _TOLD_S
            time.sleep(_TICK_S)
        if away_since is not None:
            self._broker.start()

    def _tell(self, now: float) -> None:
        load = self._load
        self._say(
            f"{now / 60:.0f} min: {answered(load)} answered, {load.disconnected} left, {len(load.errors)} errors, "
            f"{self._memory[-1].resident / 2**20:.0f} MiB"
        )

    def _settled(self) -> ServeStatus:
        """The node's counts when nothing runs and no trace is on its way any more."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            status = read_status(self._settings)
            if (
                not (status.requests_running or status.requests_waiting or status.rows_pending)
                or time.monotonic() > deadline
            ):
                return status
            time.sleep(_TICK_S)


def judge(outcome: Outcome, options: Options) -> list[Figure]:
    """The figures of a soak, with their goals."""
    load, status = outcome.load, outcome.status
    slope, growth = growth_of(outcome.memory)
    nothing = Goal(0, at_least=False)
    lost = status.rows_captured - status.rows_published - status.rows_dropped - status.rows_pending
    return [
        Figure(
            "errors",
            len(load.errors),
            goal=nothing,
            detail={"answered": answered(load), "left": load.disconnected, "told": load.errors[:10]},
        ),
        Figure("node_exit_code", abs(outcome.exit_code), goal=nothing),
        Figure("rows_unaccounted", abs(lost), goal=nothing, detail={"captured": status.rows_captured}),
        Figure("rows_pending", status.rows_pending, goal=nothing),
        Figure(
            "rows_not_as_in_topic",
            abs(status.rows_published - outcome.rows_in_topic),
            goal=nothing,
            detail={"published": status.rows_published, "in_topic": outcome.rows_in_topic, "shed": status.rows_dropped},
        ),
        Figure(
            "memory_growth",
            growth,
            goal=Goal(0.05, at_least=False),
            detail={
                "mib_per_minute": round(slope * 60 / 2**20, 3),
                "resident_mib": [
                    round(m.resident / 2**20) for m in outcome.memory[:: max(len(outcome.memory) // 30, 1)]
                ],
            },
        ),
        Figure(
            "swaps",
            len(status.swaps),
            goal=Goal(round(options.minutes * 60 / options.swap_every_s / 2), at_least=True),
            detail={
                "refused": len(status.versions_rejected),
                "pause_max_ms": max((s.pause_ms for s in status.swaps), default=0),
            },
        ),
        Figure("tokens_per_s", sum(response.output_tokens for response in load.responses) / (options.minutes * 60)),
    ]


def answered(load: Load) -> int:
    """Requests with a whole answer."""
    return len(load.responses) - len(load.errors)


def growth_of(memory: Sequence[Memory]) -> tuple[float, float]:
    """Bytes a second by which memory grew once it had settled, and the share of it that it grew by in all."""
    settled = memory[int(len(memory) * _SETTLED) :]
    times, resident = [m.seconds for m in settled], [m.resident for m in settled]
    slope: float = linear_regression(times, resident).slope
    return slope, slope * (times[-1] - times[0]) / median(resident)


def rows_in_topic(kafka: Kafka) -> int:
    """Rows of all messages of the traces topic, by their headers."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": "bench",
            "enable.auto.commit": False,
            **kafka.client_options,
        }
    )
    try:
        partitions = [TopicPartition(kafka.traces_topic, n, 0) for n in range(kafka.partitions)]
        ends = [consumer.get_watermark_offsets(partition)[1] for partition in partitions]
        left = sum(ends)
        consumer.assign(partitions)
        rows = 0
        while left:
            message = consumer.poll(30)
            if message is None or message.error():
                raise UserError(f"topic {kafka.traces_topic}: {left} messages could not be read")
            left -= 1
            rows += int(dict(message.headers() or [])["rows"] or 0)
        return rows
    finally:
        consumer.close()


def read_status(settings: Settings) -> ServeStatus:
    """What the node says of itself."""
    with urllib.request.urlopen(f"{node_url(settings)}/status", timeout=30) as answer:  # noqa: S310
        return ServeStatus.model_validate_json(answer.read())


def node_url(settings: Settings) -> str:
    """Where the node answers."""
    return f"http://{settings.serve.host}:{settings.serve.port}"


@contextmanager
def _parts(settings: Settings, folder: Path, say: Say) -> Iterator[tuple[Process, Broker, Settings]]:
    """A node, a broker and a registry, each a process of its own; the settings say where they are."""
    with ExitStack() as undo:
        say("starting broker, registry and node")
        broker = undo.enter_context(embedded_kafka.running_broker(folder / "broker"))
        registry = RegistryServer(folder / "registry", embedded_kafka.free_port(), (folder / "registry.log").absolute())
        registry.start()
        undo.callback(registry.stop)
        here = embedded_kafka.use_broker(settings, broker.bootstrap)
        serve = here.serve.model_copy(
            update={"host": "127.0.0.1", "port": embedded_kafka.free_port(), "poll_interval": 1.0}
        )
        here = here.model_copy(update={"serve": serve, "registry": Registry(tracking_uri=registry.uri)})
        node = _node(here, folder)
        node.start()
        undo.callback(node.stop)
        node.wait_ready(lambda: is_answering(f"{node_url(here)}/ready"), _READY_S)
        yield node, broker, here


def _node(settings: Settings, folder: Path) -> Process:
    log = (folder / "serve.log").absolute()
    return Process("serve", [sys.executable, "-m", "ops.cli.main", "serve"], log, to_environ(settings))


def _register(registry: SpeculatorRegistry, target: Target, trained: EagleDraft) -> list[str]:
    """Register the trained draft and the one of day 0; their versions."""
    versions = []
    for draft in (trained, target.day_0):
        # MLflow's client prints to stdout, which is the report's.
        with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
            checkpoint.write(draft, Path(scratch), target.fingerprint)
            versions.append(registry.register(target.line, Path(scratch), {"line": target.line}, {}))
    return versions
