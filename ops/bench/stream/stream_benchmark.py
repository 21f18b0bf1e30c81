"""``aurora bench stream``: throughput and latency of the stream worker, from one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from confluent_kafka import Producer

from ops.bench.embedded_kafka import running_broker
from ops.bench.harness import (
    Figure,
    Goal,
    Report,
    Say,
    Selection,
    Session,
    TrialValues,
    in_turn,
    percentile,
    select_figures,
)
from ops.bench.stream import store_commits, topic_drain
from ops.bench.stream.recorded_messages import TraceMessage, build_messages, read_recorded
from ops.bench.stream.topic_drain import DrainCost, TopicFactory
from pipeline.broker import client_config
from pipeline.consumer import flush_interval_s
from pipeline.delta import DeltaLog
from pipeline.offsets import SourcePartition
from schemas.errors import UserError
from schemas.settings import Settings

SIZES = {"64k": 64 << 10, "900k": 900 << 10}
"""Bytes of a full message."""
_WAYS = ("reading", "bare", "one", "two")
"""A consumer that discards, a bare loop into one table, one worker, two workers."""
_BARE_GOAL = Goal(0.7, at_least=True)
_MIB = 1 << 20
_BF16_BYTES = 2
_VISIBLE = ("publish_to_visible_p50_s", "publish_to_visible_p99_s")
_POLL_S = 0.01
_VISIBLE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class StreamSize:
    """How much is measured."""

    trials: int
    mib: int
    """Of messages in a topic."""
    latency_s: float
    latency_messages_per_s: float
    """Of 64 KiB: a load below the worker's capacity."""


QUICK = StreamSize(trials=2, mib=96, latency_s=15, latency_messages_per_s=20)
FULL = StreamSize(trials=5, mib=192, latency_s=60, latency_messages_per_s=20)


@dataclass
class DrainTrials:
    """The costs of each way to drain a topic of one message size, by trial."""

    messages: int
    verify_steps: int
    tokens: int
    size: int
    feature_width: int
    costs: dict[str, list[DrainCost]] = field(default_factory=lambda: {way: [] for way in _WAYS})
    peak_rss: list[int] = field(default_factory=list)
    """Of a single worker."""
    table_bytes: dict[str, int] = field(default_factory=dict)

    def per_s(self, way: str, amount: float) -> TrialValues:
        """Return the rate of ``amount`` per trial."""
        return TrialValues(tuple(amount / cost.seconds for cost in self.costs[way]))

    def figure(
        self, name: str, way: str, over: str, goal: Goal | None = None, detail: Mapping[str, Any] = MappingProxyType({})
    ) -> Figure:
        """Compare the speed of two ways."""
        one, other = (TrialValues(tuple(1 / cost.processor_s for cost in self.costs[w])) for w in (way, over))
        ratios = self.per_s(way, 1).over(self.per_s(over, 1))
        by_processor_time = {"by_processor_time": round(one.over(other).median, 4)}
        return Figure(name, ratios.median, goal=goal, ratios=ratios, detail={**by_processor_time, **detail})


def figure_names() -> list[str]:
    """Return the names of all figures."""
    of_size = ("ratio_to_bare_loop", "ratio_to_reading", "scaling_two_workers", "peak_rss_mb", "table_bytes_per_token")
    return [*(f"{name}_{size}" for size in SIZES for name in of_size), *_VISIBLE, *store_commits.FIGURE_NAMES]


def run(settings: Settings, say: Say, *, quick: bool, only: tuple[str, ...]) -> Report:
    """Measure the figures whose names begin with one of ``only``, or all.

    Raises:
        UserError: no such figure, no target to record from, or a worker ended.
        StartError: a process did not start.
    """
    size, selected, session = QUICK if quick else FULL, select_figures(only, figure_names()), Session(threads=1)
    figures: list[Figure] = []
    if any(map(selected, set(figure_names()) - set(store_commits.FIGURE_NAMES))):
        figures += _measure_worker(settings, size, selected, say)
    if any(map(selected, store_commits.FIGURE_NAMES)):
        figures += store_commits.measure(size.trials, say)
    about = {"plan": asdict(size), "seconds": session.seconds}
    title = f"stream on {session.machine['processor']}, {session.machine['cores']} cores"
    return session.report(title, about, (figure for figure in figures if selected(figure.name)))


def _measure_worker(settings: Settings, size: StreamSize, selected: Selection, say: Say) -> Iterator[Figure]:
    """Measure workers between a broker and local tables."""
    requests = read_recorded(settings, say)
    width = requests[0].envelope.feature_width
    with tempfile.TemporaryDirectory(prefix="aurora-bench-") as name, running_broker(Path(name) / "broker") as broker:
        factory = TopicFactory(settings, broker.bootstrap, Path(name))
        for label, largest in SIZES.items():
            if any(selected(figure) for figure in figure_names() if figure.endswith(label)):
                messages = build_messages(requests, largest, size.mib * _MIB)
                yield from judge(label, _measure_throughput(factory, label, messages, width, size.trials, say))
        if any(map(selected, _VISIBLE)):
            rate = size.latency_messages_per_s
            say(f"publishing {rate:g} messages per second for {size.latency_s:g} s")
            number = int(size.latency_s * rate)
            messages = build_messages(requests, SIZES["64k"], number * SIZES["64k"])[:number]
            yield from _measure_latency(factory, messages, 1 / rate)


def _measure_throughput(
    factory: TopicFactory, label: str, messages: Sequence[TraceMessage], width: int, trials: int, say: Say
) -> DrainTrials:
    """Drain the same messages in every way, in every second trial in the opposite order."""
    steps, tokens = sum(m.verify_steps for m in messages), sum(m.tokens for m in messages)
    measured = DrainTrials(len(messages), steps, tokens, sum(len(m.value) for m in messages), width)
    for trial in range(trials):
        for way in in_turn(("one", "loops", "two"), trial):
            with factory.new_topic() as settings:
                _drain(settings, way, messages, measured)
        rates = {way: measured.per_s(way, measured.size / 1e6).values[-1] for way in _WAYS}
        say(f"{label}, trial {trial + 1} of {trials}: " + ", ".join(f"{w} {r:.0f} MB/s" for w, r in rates.items()))
    return measured


def _drain(settings: Settings, way: str, messages: Sequence[TraceMessage], measured: DrainTrials) -> None:
    if way == "loops":
        topic_drain.publish(settings.kafka, messages)
        measured.costs["reading"].append(topic_drain.drain_read_only(settings.kafka))
        measured.costs["bare"].append(topic_drain.drain_bare_loop(settings))
        return
    drained = topic_drain.drain_with_workers(settings, 1 if way == "one" else 2, messages)
    measured.costs[way].append(drained.cost)
    if way == "one":
        measured.table_bytes = drained.table_bytes
        if drained.peak_rss is not None:
            measured.peak_rss.append(drained.peak_rss)


def judge(label: str, measured: DrainTrials) -> Iterator[Figure]:
    """Return the figures of one message size."""
    detail = {
        "mb_per_s": {way: round(measured.per_s(way, measured.size / 1e6).median, 1) for way in _WAYS},
        "verify_steps_per_s": {way: round(measured.per_s(way, measured.verify_steps).median) for way in _WAYS},
        "messages": measured.messages,
        "mean_message_bytes": round(measured.size / measured.messages),
    }
    yield measured.figure(f"ratio_to_bare_loop_{label}", "one", "bare", _BARE_GOAL, detail)
    yield measured.figure(f"ratio_to_reading_{label}", "one", "reading")
    yield measured.figure(f"scaling_two_workers_{label}", "two", "one")
    yield Figure(f"peak_rss_mb_{label}", max(measured.peak_rss, default=0) / 1e6 or None, "MB")
    raw = _BF16_BYTES * measured.feature_width
    by_table = {name: round(size / measured.tokens, 1) for name, size in measured.table_bytes.items()}
    per_token = sum(measured.table_bytes.values()) / measured.tokens
    detail = {"raw_bf16": raw, "over_raw": round(per_token / raw, 3), "by_table": by_table}
    yield Figure(f"table_bytes_per_token_{label}", per_token, "bytes", detail=detail)


def _measure_latency(factory: TopicFactory, messages: Sequence[TraceMessage], every_s: float) -> list[Figure]:
    """Measure the seconds from the publication of a record until its rows are readable, with one worker."""
    published: list[float] = []
    visible: list[float] = []
    with factory.new_topic() as settings, topic_drain.running_workers(settings, 1):
        producer = Producer(client_config(settings.kafka, **{"linger.ms": 20}))
        log, source = DeltaLog(settings.tables), SourcePartition(settings.kafka.traces_topic, 0)
        started = time.monotonic()
        while len(visible) < len(messages):
            now = time.monotonic()
            if len(published) < len(messages) and now >= started + len(published) * every_s:
                message, headers = messages[len(published)], list(messages[len(published)].headers)
                producer.produce(source.topic, message.value, key=message.key, partition=0, headers=headers)
                producer.poll(0)
                published.append(now)
                continue
            committed = topic_drain.count_committed(log, source)
            visible += [time.monotonic()] * (committed - len(visible))
            if now > started + len(messages) * every_s + _VISIBLE_TIMEOUT_S:
                missing = len(messages) - len(visible)
                raise UserError(f"{missing} records were not readable after {_VISIBLE_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
    waits = [after - before for before, after in zip(published, visible, strict=True)]
    detail = {"messages_per_s": round(1 / every_s, 1), "flush_s": flush_interval_s(settings)}
    return [
        Figure(name, percentile(waits, share), "s", detail=detail)
        for name, share in zip(_VISIBLE, (0.5, 0.99), strict=True)
    ]
