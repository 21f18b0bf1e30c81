"""Scenario of the demo on a running stack: traffic, the comparison without speculation, and the drain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING

from ops.demo import prompts
from ops.demo.record import EDGE, DemoRun, RowCounts, Swap, acceptance_length, rolling_acceptance_length
from ops.demo.screen import DemoScreen, DemoView
from ops.demo.stack_monitor import StackMonitor, build_version_records, newest_rate, read_versions
from ops.loadgen.load import Load, Prompt, Request, chat_request
from ops.local.stack import Stack
from pipeline.delta import DeltaLog

if TYPE_CHECKING:
    from schemas.events import AliasMoved
    from trainer.release.registry import Version

_CATCH_UP_S = 60.0
_DRAIN_S = 60.0
_LAST_RESPONSES_S = 180.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Length of the phases that follow the start."""

    traffic_s: float
    plain_requests: int


def plan_schedule(minutes: float, started_s: float) -> Schedule:
    """Return the part of ``minutes`` for traffic, at least half a minute, and the size of the comparison.

    The rest is for the requests without speculation, the drain, the stop, and the lossless check.
    """
    short = minutes < 6
    after_s = 80.0 if short else 105.0
    return Schedule(max(30.0, minutes * 60 - started_s - after_s), 16 if short else 24)


def alternate(first: Iterable[Prompt], second: Iterable[Prompt], switched: Callable[[], bool]) -> Iterator[Prompt]:
    """Yield prompts of the first domain until ``switched`` is true, then of the second; repeat each when exhausted."""
    one, two = cycle(first), cycle(second)
    while True:
        yield next(two if switched() else one)


@dataclass
class Scenario:
    """Run the phases on a stack and keep the observations."""

    stack: Stack
    screen: DemoScreen
    concurrency: int
    max_tokens: int
    _began: float = field(default_factory=time.monotonic)
    _started: float = field(default_factory=time.time)
    _total_s: float = 0.0
    _phase: str = "starting"
    _base: RowCounts = field(default_factory=RowCounts)
    _rows: RowCounts = field(default_factory=RowCounts)
    _load: Load | None = None
    _plain: Load | None = None
    _versions: tuple[Version, ...] = ()
    _promoted: tuple[AliasMoved, ...] = ()
    _champions: list[str | None] = field(default_factory=list)
    """Every champion observed, the initial one first."""
    _monitor: StackMonitor = field(init=False)

    def __post_init__(self) -> None:
        self._monitor = StackMonitor(self.stack, self._update_screen)

    def run(self, minutes: float) -> None:
        """Run all phases. Raises what ``Stack.tick`` raises."""
        self._total_s = minutes * 60
        self.stack.start()
        try:
            self._catch_up()
            schedule = plan_schedule(minutes, time.monotonic() - self._began)
            load = self._send_traffic(schedule.traffic_s)
            self._send_without_speculation(load, schedule.plain_requests)
            self._drain()
        finally:
            for each in filter(None, (self._load, self._plain)):
                each.abandon()
            self._rows = self._count_rows()
            self._monitor.close()

    def record(self) -> DemoRun:
        """Return the observations so far."""
        serve = self._monitor.overview.serve
        swaps = tuple(Swap(s.version, s.time, s.in_flight, s.pause_ms) for s in serve.swaps) if serve else ()
        return DemoRun(
            started=self._started,
            ended=time.time(),
            requests=tuple(self._load.responses) if self._load else (),
            plain=tuple(self._plain.responses) if self._plain else (),
            samples=tuple(self._monitor.samples),
            swaps=swaps,
            versions=build_version_records(self._started, self._versions, self._promoted, swaps),
            rows=self._rows,
        )

    def _catch_up(self) -> None:
        """Let the stream commit the records of an earlier run, so that only rows of this run are counted."""
        self._phase = "catching up"
        self._monitor.run_until(lambda: self._monitor.overview.trace_lag == 0, _CATCH_UP_S)
        self._base = self._count_rows()
        self._champions = self._champions[-1:]

    def _send_traffic(self, seconds: float) -> Load:
        """Send the first domain, and the second one from half of the time."""
        started = time.monotonic()
        first, second = ([Prompt(domain, text) for text in prompts.read_prompts(domain)] for domain in prompts.DOMAINS)
        traffic = alternate(first, second, lambda: time.monotonic() - started > seconds / 2)
        self._load = load = self._new_load(map(self._request, traffic))
        self._phase = "traffic"
        load.start()
        self._monitor.run_until(lambda: False, seconds)
        load.stop()
        self._phase = "last responses"
        self._monitor.run_until(lambda: not load.running, _LAST_RESPONSES_S)
        return load

    def _send_without_speculation(self, traffic: Load, count: int) -> None:
        """Send the newest prompts again without speculation while training continues."""
        self._phase = "without speculation"
        newest = (Prompt(response.domain, response.prompt) for response in traffic.responses[-count:])
        self._plain = plain = self._new_load([self._request(prompt, speculate=False) for prompt in newest])
        plain.start()
        self._monitor.run_until(lambda: not plain.running, _LAST_RESPONSES_S)

    def _request(self, prompt: Prompt, *, speculate: bool = True) -> Request:
        model = self.stack.settings.target.served_model_name
        return chat_request(model, prompt, self.max_tokens, speculate=speculate)

    def _new_load(self, requests: Iterable[Request]) -> Load:
        serve = self.stack.settings.serve
        return Load(f"http://{serve.host}:{serve.port}", requests, self.concurrency)

    def _drain(self) -> None:
        """Wait until every row is accounted for, then read the registered versions."""
        self._phase = "draining"
        self._monitor.run_until(self._is_drained, _DRAIN_S)
        if serve := self._monitor.overview.serve:
            registered, promoted = read_versions(self.stack.settings, serve.line)
            self._versions, self._promoted = tuple(registered), tuple(promoted)

    def _is_drained(self) -> bool:
        serve = self._monitor.overview.serve
        if serve is None or serve.requests_running or serve.rows_pending or self._monitor.overview.trace_lag != 0:
            return False
        self._rows = self._count_rows()
        return self._rows.balance

    def _count_rows(self) -> RowCounts:
        """Return the node's counters and the rows that the tables gained during this run."""
        log = DeltaLog(self.stack.settings.tables)
        dead = log.read("dead_letters", ["rows"])["rows"].to_pylist()
        serve = self._monitor.overview.serve
        return RowCounts(
            published=serve.rows_captured if serve else 0,
            in_table=log.row_count("traces") - self._base.in_table,
            dropped=serve.rows_dropped if serve else 0,
            dead=sum(rows or 0 for rows in dead) - self._base.dead,
        )

    def _update_screen(self) -> None:
        overview = self._monitor.overview
        promoter, serve, train = overview.promoter, overview.serve, overview.train
        if promoter and promoter.champion not in self._champions:
            self._champions.append(promoter.champion)
        responses = [*self._load.responses] if self._load else []
        self.screen.show(
            DemoView(
                phase=self._phase,
                elapsed_s=time.monotonic() - self._began,
                total_s=self._total_s,
                domain=responses[-1].domain if responses else "",
                requests=len(responses),
                failed=sum(response.error is not None for response in responses),
                tokens_per_s=newest_rate(self._monitor.samples),
                acceptance_length=acceptance_length(responses[-EDGE:]),
                acceptance_lengths=tuple(rolling_acceptance_length(responses)),
                trace_lag=overview.trace_lag,
                step=train.step if train else 0,
                loss=train.loss if train else None,
                registered=len(train.registered) if train else 0,
                promoted=max(len(self._champions) - 1, 0),
                serving=serve.speculator if serve else "",
            )
        )
