"""``aurora bench stream``: from the topic to committed tables, beside loops over the same records, from one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from confluent_kafka import Producer

from ops.bench import draining, embedded, machine
from ops.bench.draining import Ground, Load, Took
from ops.bench.messages import Message, messages, recorded
from ops.bench.outcome import Report, chosen
from ops.bench.paired import Figure, Goal, Samples, percentile
from ops.local.stack import Say
from pipeline.delta import DeltaLog
from pipeline.kafka_admin import client
from pipeline.offsets import Source
from schemas.errors import UserError
from schemas.settings import Settings
from trainer.release.registration import code_revision

SIZES = {"64k": 64 << 10, "900k": 900 << 10}
"""Bytes of a full message."""
_WAYS = ("reading", "bare", "one", "two")
"""A consumer that does nothing, a bare loop into one table, one worker, two workers."""
_BARE_GOAL = Goal(0.7, at_least=True)
_MIB = 1 << 20
_BF16_BYTES = 2
_VISIBLE = ("publish_to_visible_p50_s", "publish_to_visible_p99_s")
_PEEK_S = 0.01
_VISIBLE_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    trials: int
    mib: int
    """Messages in a topic."""
    latency_s: float
    latency_messages_per_s: float
    """Of 64 KiB: a load that the worker has time for."""


QUICK = Plan(trials=2, mib=96, latency_s=15, latency_messages_per_s=20)
FULL = Plan(trials=5, mib=192, latency_s=60, latency_messages_per_s=20)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    quick: bool
    only: tuple[str, ...]
    """Names of figures, or how they begin; none for all."""

    @property
    def plan(self) -> Plan:
        """How much is measured."""
        return QUICK if self.quick else FULL


@dataclass
class Trials:
    """What each way took to empty a topic of one message size, trial by trial."""

    load: Load
    feature_width: int
    took: dict[str, list[Took]] = field(default_factory=lambda: {way: [] for way in _WAYS})
    peak_rss: list[int] = field(default_factory=list)
    """Of a worker that was alone."""
    table_bytes: dict[str, int] = field(default_factory=dict)

    def per_s(self, way: str, amount: float) -> Samples:
        """So much a second, by trial."""
        return Samples(tuple(amount / took.seconds for took in self.took[way]))

    def ratio(self, way: str, over: str) -> tuple[Samples, float]:
        """How many times as fast one way is as another, by trial, and by processor time in the median."""
        processor = (Samples(tuple(1 / took.processor for took in self.took[w])) for w in (way, over))
        return self.per_s(way, 1).over(self.per_s(over, 1)), next(processor).over(next(processor)).median


def names() -> list[str]:
    """All figures."""
    of_size = ("ratio_to_bare_loop", "ratio_to_reading", "scaling_two_workers", "peak_rss_mb", "table_bytes_per_token")
    return [*(f"{name}_{size}" for size in SIZES for name in of_size), *_VISIBLE]


def run(settings: Settings, options: Options, say: Say) -> Report:
    """Measure.

    Raises:
        UserError: no such figure, no target to record from, or a worker ended.
        StartError: a part did not come up.
    """
    started, plan, wanted = time.monotonic(), options.plan, chosen(options.only, names())
    described = machine.describe(threads=1)
    requests = recorded(settings, say)
    width = requests[0].envelope.feature_width
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="aurora-bench-") as name, embedded.broker(Path(name) / "broker") as broker:
        ground = Ground(settings, broker.bootstrap, Path(name))
        for size, largest in SIZES.items():
            if any(wanted(figure) for figure in names() if figure.endswith(size)):
                made = messages(requests, largest, plan.mib * _MIB)
                figures += [f for f in throughput(ground, size, made, width, plan.trials, say) if wanted(f.name)]
        if any(map(wanted, _VISIBLE)):
            say(f"publishing {plan.latency_messages_per_s:g} messages a second for {plan.latency_s:g} s")
            number = int(plan.latency_s * plan.latency_messages_per_s)
            made = messages(requests, SIZES["64k"], number * SIZES["64k"])[:number]
            figures += [f for f in latency(ground, made, 1 / plan.latency_messages_per_s) if wanted(f.name)]
    described["load_average_after"] = machine.load_average()
    about = {"plan": asdict(plan), "seconds": round(time.monotonic() - started, 1)}
    title = f"stream on {described['processor']}, {described['cores']} cores"
    return Report(title, described, code_revision(), about, tuple(figures))


def throughput(
    ground: Ground, size: str, made: Sequence[Message], width: int, trials: int, say: Say
) -> Iterator[Figure]:
    """Every way in turn over the same messages; in every second trial in the opposite order."""
    measured = Trials(Load.of(made), width)
    ways: list[Callable[[], None]] = [
        lambda: _workers(ground, made, measured, 1),
        lambda: _loops(ground, made, measured),
        lambda: _workers(ground, made, measured, 2),
    ]
    for trial in range(trials):
        for way in ways[:: 1 if trial % 2 == 0 else -1]:
            way()
        rates = {way: measured.per_s(way, measured.load.size / 1e6).values[-1] for way in _WAYS}
        say(f"{size}, trial {trial + 1} of {trials}: " + ", ".join(f"{w} {r:.0f} MB/s" for w, r in rates.items()))
    yield from judge(size, measured)


def judge(size: str, measured: Trials) -> list[Figure]:
    """The figures of one message size."""
    load = measured.load
    rate = {way: measured.per_s(way, load.size / 1e6) for way in _WAYS}
    told = {
        "mb_per_s": {way: round(samples.median, 1) for way, samples in rate.items()},
        "verify_steps_per_s": {way: round(measured.per_s(way, load.verify_steps).median) for way in rate},
        "messages": load.messages,
        "mean_message_bytes": round(load.size / load.messages),
    }
    raw = _BF16_BYTES * measured.feature_width
    per_token = {name: round(size_ / load.tokens, 1) for name, size_ in measured.table_bytes.items()}
    total = sum(measured.table_bytes.values()) / load.tokens
    return [
        _ratio(f"ratio_to_bare_loop_{size}", measured, "one", "bare", _BARE_GOAL, told),
        _ratio(f"ratio_to_reading_{size}", measured, "one", "reading"),
        _ratio(f"scaling_two_workers_{size}", measured, "two", "one"),
        Figure(f"peak_rss_mb_{size}", max(measured.peak_rss, default=0) / 1e6 or None, "MB"),
        Figure(
            f"table_bytes_per_token_{size}",
            total,
            "bytes",
            detail={"raw_bf16": raw, "over_raw": round(total / raw, 3), "by_table": per_token},
        ),
    ]


def _ratio(
    name: str,
    measured: Trials,
    way: str,
    over: str,
    goal: Goal | None = None,
    told: Mapping[str, Any] = MappingProxyType({}),
) -> Figure:
    samples, by_processor_time = measured.ratio(way, over)
    detail = {"by_processor_time": round(by_processor_time, 4), **told}
    return Figure(name, samples.median, goal=goal, samples=samples, detail=detail)


def latency(ground: Ground, made: Sequence[Message], every_s: float) -> list[Figure]:
    """Seconds from a record's publication to its rows being readable, one worker, under a load that it has time for."""
    settings = ground.settings()
    published: list[float] = []
    seen: list[float] = []
    with draining.running(settings, 1):
        producer = Producer(client(settings.kafka, **{"linger.ms": 20}))
        log, source = DeltaLog(settings.tables), Source(settings.kafka.traces_topic, 0)
        began = time.monotonic()
        while len(seen) < len(made):
            now = time.monotonic()
            if len(published) < len(made) and now >= began + len(published) * every_s:
                message = made[len(published)]
                producer.produce(
                    source.topic, message.value, key=message.key, partition=0, headers=list(message.headers)
                )
                producer.poll(0)
                published.append(now)
                continue
            visible = draining.contained(log, source)
            seen += [time.monotonic()] * (visible - len(seen))
            if now > began + len(made) * every_s + _VISIBLE_WITHIN_S:
                raise UserError(f"{len(made) - len(seen)} records were not to be read after {_VISIBLE_WITHIN_S:.0f} s")
            time.sleep(_PEEK_S)
    ground.forget(settings)
    waits = [after - before for before, after in zip(published, seen, strict=True)]
    detail = {"messages_per_s": round(1 / every_s, 1), "flush_s": settings.stream.flush_interval}
    shares = zip(_VISIBLE, (0.5, 0.99), strict=True)
    return [Figure(name, percentile(waits, share), "s", detail=detail) for name, share in shares]


def _workers(ground: Ground, made: Sequence[Message], measured: Trials, number: int) -> None:
    settings = ground.settings()
    tabled = draining.drain(settings, number, made)
    measured.took["one" if number == 1 else "two"].append(tabled.took)
    if number == 1:
        measured.table_bytes = draining.table_bytes(tabled.tables)
        if tabled.peak_rss is not None:
            measured.peak_rss.append(tabled.peak_rss)
    ground.forget(settings)


def _loops(ground: Ground, made: Sequence[Message], measured: Trials) -> None:
    settings = ground.settings()
    draining.publish(settings.kafka, made)
    measured.took["reading"].append(draining.read_only(settings.kafka))
    measured.took["bare"].append(draining.bare_loop(settings))
    ground.forget(settings)
