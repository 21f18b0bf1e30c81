"""Scenario of the demo on a running stack: first requests, traffic, drain, and the measured speed-up."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

import psutil

from ops.demo import prompts
from ops.demo.comparison import Block, Trial, other_programs, read_processor_times
from ops.demo.record import (
    EDGE,
    DemoRun,
    RowCounts,
    Swap,
    acceptance_length,
    accepted_by_source,
    rolling_acceptance_length,
)
from ops.demo.screen import DemoScreen, DemoView
from ops.demo.stack_monitor import StackMonitor, build_version_records, newest_rate, read_versions
from ops.loadgen.load import Load, Prompt, Response, chat_request, read_api_key
from ops.local.stack import Stack, page_address
from pipeline.delta import DeltaLog

if TYPE_CHECKING:
    from schemas.events import AliasMoved
    from trainer.release.registry import Version

_CATCH_UP_S = 60.0
_DRAIN_S = 60.0
_SETTLE_S = 60.0
_LAST_RESPONSES_S = 180.0
_STOP_AND_CHECK_S = 70.0
"""Drain, stop of the stack and lossless check."""
_MIN_TRAFFIC_S = 30.0
_FIRST_TRIALS = 4
_FIRST_SHARE = 0.25
"""Share of the demo after which no further trial of the first requests begins."""
_BLOCK = 16
"""Requests of a measured block, unless the concurrency is higher."""
_TRIALS = 3, 8
"""Fewest and most trials of the measurement: as many as fit into ``_MEASURED_SHARE`` of the demo."""
_MEASURED_SHARE = 0.2
_PLAIN = "-no-speculation"
"""Suffix of the label of traced requests without speculation."""


def plan_traffic(minutes: float, elapsed_s: float) -> float:
    """Return how many seconds of ``minutes`` are for traffic: what the other phases leave, at least half a minute."""
    total_s = minutes * 60
    return max(_MIN_TRAFFIC_S, total_s - elapsed_s - _MEASURED_SHARE * total_s - _STOP_AND_CHECK_S)


def plan_trials(minutes: float, block_s: float) -> int:
    """Return how many trials fit into the measurement, if a block takes ``block_s``."""
    fewest, most = _TRIALS
    return min(max(int(_MEASURED_SHARE * minutes * 60 / (2 * block_s)), fewest), most)


def size_first_blocks(concurrency: int) -> list[int]:
    """Return the requests of each block of the first trials: together ``EDGE``, or more for full blocks.

    A block has a multiple of ``concurrency`` requests: a last request that runs alone would take time and say little.
    """
    multiples = math.ceil(EDGE / concurrency)
    trials = min(_FIRST_TRIALS, multiples)
    return [(multiples * (i + 1) // trials - multiples * i // trials) * concurrency for i in range(trials)]


def size_measured_block(concurrency: int) -> int:
    """Return the requests of a block of the measurement, a multiple of ``concurrency``."""
    return concurrency * max(2, round(_BLOCK / concurrency))


def alternate(first: Iterator[Prompt], second: Iterator[Prompt], switched: Callable[[], bool]) -> Iterator[Prompt]:
    """Yield prompts of the first domain until ``switched`` is true, then of the second."""
    while True:
        yield next(second if switched() else first)


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
    _traffic: list[Load] = field(default_factory=list)
    """Traced loads with speculation."""
    _others: list[Load] = field(default_factory=list)
    _first: list[Trial] = field(default_factory=list)
    _measured: list[Trial] = field(default_factory=list)
    _other_programs: float | None = None
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
        one, other = ([Prompt(domain, text) for text in prompts.read_prompts(domain)] for domain in prompts.DOMAINS)
        block = size_measured_block(self.concurrency)
        unsent = min((_TRIALS[1] + 1) * block + self.concurrency, len(other) // 2)
        first, second, reserved = cycle(one), cycle(other[:-unsent]), cycle(other[-unsent:])
        self.stack.start()
        self.screen.say(f"the loop is at {page_address(self.stack.settings)}")
        try:
            self._catch_up()
            self._warm_up(reserved)
            self._send_first_requests(first, until_s=_FIRST_SHARE * self._total_s)
            self._send_traffic(first, second, plan_traffic(minutes, time.monotonic() - self._began))
            self._stop_training()
            self._measure(reserved, block, minutes)
            self._drain()
        finally:
            for load in (*self._traffic, *self._others):
                load.abandon()
            self._rows = self._count_rows()
            self._monitor.close()

    def record(self) -> DemoRun:
        """Return the observations so far."""
        serve = self._monitor.overview.serve
        swaps = tuple(Swap(s.version, s.time, s.in_flight, s.pause_ms) for s in serve.swaps) if serve else ()
        return DemoRun(
            started=self._started,
            ended=time.time(),
            requests=tuple(self._responses),
            first=tuple(self._first),
            measured=tuple(self._measured),
            other_programs=self._other_programs,
            samples=tuple(self._monitor.samples),
            swaps=swaps,
            versions=build_version_records(self._started, self._versions, self._promoted, swaps),
            rows=self._rows,
        )

    @property
    def _responses(self) -> list[Response]:
        """Responses of the traffic so far."""
        return [response for load in self._traffic for response in load.responses]

    def _catch_up(self) -> None:
        """Let the stream commit the records of an earlier run, so that only rows of this run are counted."""
        self._phase = "catching up"
        self._monitor.run_until(lambda: self._monitor.overview.trace_lag == 0, _CATCH_UP_S)
        self._base = self._count_rows()
        self._champions = self._champions[-1:]

    def _warm_up(self, unsent: Iterator[Prompt]) -> None:
        """Let the node answer for the first time, without speculation: neither arm of the first trial pays for it."""
        self._phase = "first requests"
        self._run_block(list(islice(unsent, self.concurrency)), speculate=False, trace=False)

    def _send_first_requests(self, traffic: Iterator[Prompt], until_s: float) -> None:
        """Send the first requests of the traffic, and as many others without speculation.

        All of them are traced, because traces cost both arms the same. The others have a label of their own: their
        answers do not enter the corpus of the traffic.
        """
        for number, size in enumerate(size_first_blocks(self.concurrency)):
            if self._first and time.monotonic() - self._began > until_s:
                break
            speculative, plain = list(islice(traffic, size)), list(islice(traffic, size))
            plain = [replace(prompt, domain=f"{prompt.domain}{_PLAIN}") for prompt in plain]
            self._first.append(self._run_trial(speculative, plain, number, trace=True))

    def _send_traffic(self, first: Iterator[Prompt], second: Iterator[Prompt], seconds: float) -> None:
        """Send the first domain, and the second one from half of the time."""
        started = time.monotonic()
        traffic = alternate(first, second, lambda: time.monotonic() - started > seconds / 2)
        self._phase = "traffic"
        load = self._start_load(traffic, trace=True)
        self._monitor.run_until(lambda: False, seconds)
        load.stop()
        self._phase = "last responses"
        self._monitor.run_until(lambda: not load.running, _LAST_RESPONSES_S)

    def _stop_training(self) -> None:
        """Stop the trainer, drain the stream, and let the promoter and the node follow the newest version."""
        self._phase = "stopping the trainer"
        self.stack.supervisor.stop(["train"])
        self.screen.say("the trainer has stopped; the speed-up is measured next")
        settings = self.stack.settings
        settled = time.monotonic() + settings.promoter.poll_interval + settings.serve.poll_interval + 1
        self._monitor.run_until(self._is_drained, _DRAIN_S)
        self._monitor.run_until(lambda: time.monotonic() > settled and self._serves_champion, _SETTLE_S)

    @property
    def _serves_champion(self) -> bool:
        """Whether the node has nothing to swap: it has the champion, or drafts without versions."""
        serve, promoter = self._monitor.overview.serve, self._monitor.overview.promoter
        if serve is None or promoter is None:
            return False
        return not serve.speculator or promoter.champion in (None, serve.speculator)

    def _measure(self, unsent: Iterator[Prompt], size: int, minutes: float) -> None:
        """Compare speculation with none on prompts that were not sent before, without traces."""
        self._phase = "measuring the speed-up"
        # An adaptive node has no statistics of a version that was swapped in a moment ago.
        warm_up = self._run_block(list(islice(unsent, size)), speculate=True, trace=False)
        trials = plan_trials(minutes, warm_up.ended - warm_up.started)
        before, processors = read_processor_times(), os.cpu_count() or 1
        for number in range(trials):
            selected = list(islice(unsent, size))
            self._measured.append(self._run_trial(selected, selected, number, trace=False))
            self._other_programs = other_programs(before, read_processor_times(), processors)

    def _run_trial(self, speculative: Sequence[Prompt], plain: Sequence[Prompt], number: int, *, trace: bool) -> Trial:
        """Run a block with speculation and one without; every second trial begins with the other one."""
        selected = {True: speculative, False: plain}
        blocks = {
            speculate: self._run_block(selected[speculate], speculate=speculate, trace=trace)
            for speculate in ((True, False), (False, True))[number % 2]
        }
        trial = Trial(speculative=blocks[True], plain=blocks[False])
        self.screen.say(
            f"{len(plain)} requests: {trial.plain.tokens_per_s:.1f} tokens/s without speculation, "
            f"{trial.speculative.tokens_per_s:.1f} with it"
        )
        return trial

    def _run_block(self, selected: Sequence[Prompt], *, speculate: bool, trace: bool) -> Block:
        """Send the prompts and wait for all responses; a node that stays silent fails them."""
        node = psutil.Process(self.stack.supervisor.parts["serve"].part.process.pid)
        before = sum(node.cpu_times()[:2])
        load = self._start_load(selected, speculate=speculate, trace=trace)
        self._monitor.run_until(lambda: not load.running, math.inf)
        return Block(tuple(load.responses), sum(node.cpu_times()[:2]) - before)

    def _start_load(self, selected: Iterable[Prompt], *, speculate: bool = True, trace: bool) -> Load:
        serve, model = self.stack.settings.serve, self.stack.settings.target.served_model_name
        requests = (
            chat_request(model, prompt, self.max_tokens, speculate=speculate, trace=trace) for prompt in selected
        )
        key = read_api_key(serve)
        load = Load(f"http://{serve.host}:{serve.port}", requests, self.concurrency, api_key=key)
        (self._traffic if trace and speculate else self._others).append(load)
        load.start()
        return load

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
        responses = self._responses
        suffix, speculator = accepted_by_source(responses[-EDGE:]) or (None, None)
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
                suffix_accepted=suffix,
                speculator_accepted=speculator,
                draft_depth=serve.draft_depth if serve else None,
                trace_lag=overview.trace_lag,
                step=train.step if train else 0,
                loss=train.loss if train else None,
                registered=len(train.registered) if train else 0,
                promoted=max(len(self._champions) - 1, 0),
                serving=serve.speculator if serve else "",
            )
        )
