"""The part of the demo that is played on the running stack: traffic, the comparison, and the drain."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ops.demo import prompts
from ops.demo.record import EDGE, Rows, Run, Swap, accepted_per_step, rolling_accepted_per_step
from ops.demo.screen import DemoScreen, View
from ops.demo.watch import Watch, newest_rate
from ops.loadgen.traffic import Load, Prompt, changing
from ops.local.stack import Stack
from ops.observe import version_history
from pipeline.delta import DeltaLog

if TYPE_CHECKING:
    from schemas.events import AliasMoved
    from trainer.release.registry import Version

_CATCH_UP_S = 60.0
_DRAIN_S = 60.0
_LAST_ANSWERS_S = 180.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the time is spent that the start has left."""

    traffic_s: float
    plain_requests: int


def schedule(minutes: float, started_s: float) -> Schedule:
    """The part of ``minutes`` for traffic, half a minute at least; the rest is for what comes after it.

    After the traffic come the requests without speculation, the drain, the stop, and the check by the target alone.
    """
    short = minutes < 6
    after_s = 80.0 if short else 105.0
    return Schedule(max(30.0, minutes * 60 - started_s - after_s), 16 if short else 24)


@dataclass
class Player:
    """Drives the stack through the phases and keeps what it sees."""

    stack: Stack
    screen: DemoScreen
    concurrency: int
    max_tokens: int
    _began: float = field(default_factory=time.monotonic)
    _started: float = field(default_factory=time.time)
    _total_s: float = 0.0
    _phase: str = "starting"
    _base: Rows = field(default_factory=Rows)
    _rows: Rows = field(default_factory=Rows)
    _load: Load | None = None
    _plain: Load | None = None
    _versions: tuple[Version, ...] = ()
    _promoted: tuple[AliasMoved, ...] = ()
    _champions: list[str | None] = field(default_factory=list)
    """Every champion that was seen, the one of the beginning first."""
    _watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self._watch = Watch(self.stack, self._looked)

    def play(self, minutes: float) -> None:
        """Run all phases. Raises what ``Stack.tick`` raises."""
        self._total_s = minutes * 60
        self.stack.start()
        try:
            self._catch_up()
            planned = schedule(minutes, time.monotonic() - self._began)
            self._load = self._new_load()
            self._traffic(self._load, planned.traffic_s)
            self._plain = self._again_without_speculation(self._load, planned.plain_requests)
            self._drain()
        finally:
            for load in filter(None, (self._load, self._plain)):
                load.abandon()
            self._rows = self._count()
            self._watch.close()

    def record(self) -> Run:
        """What is known by now."""
        serve = self._watch.overview.serve
        swaps = tuple(Swap(s.version, s.time, s.in_flight, s.pause_ms) for s in serve.swaps) if serve else ()
        return Run(
            started=self._started,
            ended=time.time(),
            requests=tuple(self._load.done) if self._load else (),
            plain=tuple(self._plain.done) if self._plain else (),
            samples=tuple(self._watch.samples),
            swaps=swaps,
            versions=version_history.since(self._started, self._versions, self._promoted, swaps),
            rows=self._rows,
        )

    def _catch_up(self) -> None:
        """Let the stream finish what an earlier run left, so that this run's rows can be told from that run's."""
        self._phase = "catching up"
        self._watch.until(lambda: self._watch.overview.trace_lag == 0, _CATCH_UP_S)
        self._base = self._count()
        self._champions = self._champions[-1:]

    def _new_load(self) -> Load:
        settings = self.stack.settings
        url = f"http://{settings.serve.host}:{settings.serve.port}"
        return Load(url, settings.target.served_model_name, iter(()), self.concurrency, self.max_tokens)

    def _traffic(self, load: Load, seconds: float) -> None:
        """The first domain, and from half-way on the second."""
        begins = time.monotonic()
        first, second = ([Prompt(domain, text) for text in prompts.read_prompts(domain)] for domain in prompts.DOMAINS)
        load.prompts = changing(first, second, lambda: time.monotonic() - begins > seconds / 2)
        self._phase = "traffic"
        load.start()
        self._watch.until(lambda: False, seconds)
        load.stop()
        self._phase = "last answers"
        self._watch.until(lambda: not load.running, _LAST_ANSWERS_S)

    def _again_without_speculation(self, before: Load, count: int) -> Load:
        """Send the newest prompts again without speculation; the learning goes on beside it as before."""
        self._phase = "without speculation"
        newest = [Prompt(answered.domain, answered.prompt) for answered in before.done[-count:]]
        plain = replace(self._new_load(), prompts=iter(newest), speculate=False)
        self._plain = plain
        plain.start()
        self._watch.until(lambda: not plain.running, _LAST_ANSWERS_S)
        return plain

    def _drain(self) -> None:
        """Wait until every row is where it belongs, and for the versions that were registered."""
        self._phase = "draining"
        self._watch.until(self._drained, _DRAIN_S)
        serve = self._watch.overview.serve
        if serve:
            registered, promoted = version_history.read(self.stack.settings, serve.line)
            self._versions, self._promoted = tuple(registered), tuple(promoted)

    def _drained(self) -> bool:
        serve = self._watch.overview.serve
        if serve is None or serve.requests_running or serve.rows_pending or self._watch.overview.trace_lag != 0:
            return False
        self._rows = self._count()
        return self._rows.balance

    def _count(self) -> Rows:
        """Rows of this run: the node's counts, and what the tables hold beyond what was in them before."""
        log = DeltaLog(self.stack.settings.tables)
        dead = log.read("dead_letters", ["rows"])["rows"].to_pylist()
        serve = self._watch.overview.serve
        return Rows(
            published=serve.rows_captured if serve else 0,
            in_table=log.row_count("traces") - self._base.in_table,
            shed=serve.rows_dropped if serve else 0,
            dead=sum(rows or 0 for rows in dead) - self._base.dead,
        )

    def _looked(self) -> None:
        promoter = self._watch.overview.promoter
        if promoter and promoter.champion not in self._champions:
            self._champions.append(promoter.champion)
        self.screen.show(self._view())

    def _view(self) -> View:
        done = [*self._load.done] if self._load else []
        serve, train = self._watch.overview.serve, self._watch.overview.train
        return View(
            phase=self._phase,
            elapsed_s=time.monotonic() - self._began,
            total_s=self._total_s,
            domain=done[-1].domain if done else "",
            requests=len(done),
            failed=sum(answered.error is not None for answered in done),
            tokens_per_s=newest_rate(self._watch.samples),
            accepted_per_step=accepted_per_step(done[-EDGE:]),
            accepted_per_steps=tuple(rolling_accepted_per_step(done)),
            trace_lag=self._watch.overview.trace_lag,
            step=train.step if train else 0,
            loss=train.loss if train else None,
            registered=len(train.registered) if train else 0,
            promoted=max(len(self._champions) - 1, 0),
            serving=serve.speculator if serve else "",
        )
