"""One run of the loop on a running stack: learn, pause the trainer and measure, in one domain and then in another.

With an imported draft the first domain is not learned: the draft is its champion from the start.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from ops.bench import prompts
from ops.bench.harness import Say
from ops.bench.loop.imported_draft import import_draft
from ops.bench.loop.learning_delay import Delays, Span, measure_delays, read_served_versions, read_steps
from ops.bench.loop.node_comparison import ComparisonResult, ComparisonSize, NodeArm, ServingNode, compare_on_node
from ops.demo.record import EDGE, DemoRun, Swap, acceptance_length
from ops.demo.stack_monitor import StackMonitor, build_version_records, newest_rate, read_versions
from ops.loadgen.load import Load, Prompt, Response
from ops.local.stack import Stack
from ops.report.page import format_number
from schemas.errors import UserError
from schemas.settings import DAY_0

YOUNG_S = 120.0
"""Rows of the last seconds of learning do not count: twice the goal for the delay."""
ADAPTIVE, STATIC, NONE = "adaptive", "static", "none"
"""Arms: the newest champion, the champion at the shift, and no speculation."""
_PROGRESS_INTERVAL_S = 15.0
_LAST_OUTPUTS_S = 180.0
_SETTLE_S = 60.0
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class LoopSize:
    """How long, and how much."""

    minutes: tuple[float, float]
    """Learning in the first domain, and in the second."""
    concurrency: int
    """Of the traffic."""
    max_tokens: int
    alone: int
    """Trials with one request at a time."""
    loaded: int
    """Trials with the concurrency of the traffic."""
    training: int
    """Trials while the trainer runs."""


@dataclass(frozen=True, slots=True)
class LoopRecord:
    """Everything that the figures are made from."""

    domains: tuple[str, str]
    run: DemoRun
    training: ComparisonResult | None
    """The first domain, at the concurrency of the traffic, beside a running trainer; None with an imported draft."""
    first: tuple[ComparisonResult, ...]
    """The first domain with the trainer paused: one request at a time, then the concurrency of the traffic if above."""
    second: tuple[ComparisonResult, ...]
    """The same of the second domain."""
    at_shift: str | None
    """The champion when the second domain began; None if there was none."""
    delays: Delays

    @property
    def learned(self) -> tuple[str, ...]:
        """The domains whose traffic the trainer has learned from."""
        return self.domains[1:] if self.training is None else self.domains


class TwoDomainRun:
    """One run through two domains."""

    def __init__(
        self, stack: Stack, domains: tuple[str, str], size: LoopSize, say: Say, imported: Path | None = None
    ) -> None:
        """Prepare a run.

        Args:
            stack: Not started.
            domains: In the order of the traffic.
            size: How long, and how much.
            say: Takes notes on the progress.
            imported: Folder of a draft that was trained on the first domain; None learns that domain.
        """
        self._stack, self._domains, self._size, self._say = stack, domains, size, say
        self._imported = imported
        self._monitor = StackMonitor(stack, self._report_progress)
        self._started = time.time()
        self._phase = "starting"
        self._reported = 0.0
        self._load: Load | None = None
        self._done: list[Response] = []
        self._learning: list[Span] = []
        self._measuring: list[Span] = []

    def run(self) -> LoopRecord:
        """Run all phases."""
        traffic, held_out = {}, {}
        for domain in self._domains:
            traffic[domain] = cycle([Prompt(domain, text) for text in prompts.training_prompts(domain)])
            held_out[domain] = [Prompt(domain, text) for text in prompts.held_out_prompts(domain)]
        one, other = self._domains
        try:
            self._stack.start()
            self._node = self._serving_node()
            training: ComparisonResult | None = None
            if self._imported is None:
                self._learn(one, traffic[one], self._size.minutes[0])
                training = self._measure_while_training(traffic[one])
                at_shift = self._pause_trainer()
            else:
                at_shift = self._serve_imported(self._imported)
            first = self._measure(held_out[one], champion_arms(at_shift))
            self._resume_trainer()
            self._learn(other, traffic[other], self._size.minutes[1])
            now = self._pause_trainer()
            second = self._measure(held_out[other], champion_arms(now) | static_arm(now, at_shift))
            return self._record(training, first, second, at_shift)
        finally:
            if self._load:
                self._load.abandon()
            self._monitor.close()

    def _serving_node(self) -> ServingNode:
        pid = self._stack.supervisor.parts["serve"].part.process.pid
        assert pid is not None, "a started stack has a node"
        return ServingNode(self._stack.settings, pid, self._size.max_tokens)

    def _learn(self, domain: str, traffic: Iterator[Prompt], minutes: float) -> None:
        """Send traffic of a domain while the loop learns."""
        self._learning.append((time.time(), float("inf")))
        self._phase = f"learning {domain}"
        self._load = load = self._node.load(traffic, self._size.concurrency)
        load.start()
        self._monitor.run_until(lambda: False, minutes * 60)
        load.stop()
        self._monitor.run_until(lambda: not load.running, _LAST_OUTPUTS_S)
        self._done += load.responses
        self._load = None

    def _measure_while_training(self, traffic: Iterator[Prompt]) -> ComparisonResult:
        """Compare speculation with none on live traffic beside the running trainer."""
        self._say("measuring while the trainer runs")
        arms = {ADAPTIVE: NodeArm(speculate=True), NONE: NodeArm(speculate=False)}
        size = replace(self._loaded, trials=self._size.training, trace=True)
        # One block more: the last prompts warm up, and their answers stay in the corpus.
        return compare_on_node(self._node, arms, list(islice(traffic, size.prompts * (size.trials + 1))), size)

    def _serve_imported(self, folder: Path) -> str:
        """Make an imported draft the champion, with which node and trainer begin, and return its version."""
        self._phase = "importing"
        self._stack.supervisor.stop(["train"])
        self._say(f"importing {folder}")
        version = import_draft(self._stack.settings, folder)
        # The trainer has begun with the day-0 draft.
        shutil.rmtree(self._stack.settings.train.checkpoint_dir, ignore_errors=True)
        if (active := self._await_champion()) != version:
            raise UserError(f"the node serves {active}, not the imported version {version}; see its log")
        return version

    def _pause_trainer(self) -> str | None:
        """Stop the trainer, wait until the node serves the champion, and return the active version."""
        self._phase = "paused"
        self._say("stopping the trainer to measure")
        self._stack.supervisor.stop(["train"])
        version = self._await_champion()
        self._learning[-1] = (self._learning[-1][0], time.time())
        return version

    def _await_champion(self) -> str | None:
        """Wait until the node serves the champion, and return the active version; None for the day-0 draft."""
        promoter, serve = self._stack.settings.promoter, self._stack.settings.serve
        settled = time.monotonic() + promoter.poll_interval + serve.poll_interval + _POLL_S
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < settled or (not self._serves_champion and time.monotonic() < deadline):
            time.sleep(_POLL_S)
            self._monitor.sample()
        serving = self._monitor.overview.serve
        if serving is None:
            raise UserError(f"no answer from the node: {self._monitor.overview.silent.get('serve')}")
        return None if serving.speculator.startswith(DAY_0) else serving.speculator

    @property
    def _serves_champion(self) -> bool:
        serve, promoter = self._monitor.overview.serve, self._monitor.overview.promoter
        return serve is not None and promoter is not None and promoter.champion in (None, serve.speculator)

    def _measure(self, held_out: Sequence[Prompt], arms: Mapping[str, NodeArm]) -> tuple[ComparisonResult, ...]:
        """Compare the arms on held-out prompts, untraced: one request at a time, then as many as the traffic has."""
        alone = ComparisonSize(1, self._size.alone, 2)
        sizes = [alone, self._loaded] if self._size.concurrency > 1 else [alone]
        results, started = [], time.time()
        for size in sizes:
            self._say(f"measuring {', '.join(arms)} on held-out prompts, {size.concurrency} at a time")
            results.append(compare_on_node(self._node, arms, held_out, size))
            rates = results[-1].rates.items()
            self._say(", ".join(f"{name} {rate.tokens_per_s}" for name, rate in rates) + " tokens/s")
        self._measuring.append((started, time.time()))
        return tuple(results)

    def _resume_trainer(self) -> None:
        """Follow the alias again, and start the trainer from its checkpoint."""
        self._node.unpin()
        self._say("starting the trainer again")
        self._stack.start()

    @property
    def _loaded(self) -> ComparisonSize:
        return ComparisonSize(self._size.concurrency, self._size.loaded, 2 * self._size.concurrency)

    def _record(
        self,
        training: ComparisonResult | None,
        first: tuple[ComparisonResult, ...],
        second: tuple[ComparisonResult, ...],
        at_shift: str | None,
    ) -> LoopRecord:
        self._monitor.sample()
        serve, settings = self._monitor.overview.serve, self._stack.settings
        assert serve is not None, "the node has just answered"
        swaps = exclude_pinned([Swap(s.version, s.time, s.in_flight, s.pause_ms) for s in serve.swaps], self._measuring)
        registered, promoted = read_versions(settings, serve.line)
        steps = read_steps(settings, serve.line, self._started)
        run = DemoRun(
            started=self._started,
            ended=time.time(),
            requests=tuple(self._done),
            samples=tuple(self._monitor.samples),
            swaps=swaps,
            versions=build_version_records(self._started, registered, promoted, swaps),
        )
        served = read_served_versions(settings, registered, swaps)
        delays = measure_delays(steps, served, self._learning, YOUNG_S)
        return LoopRecord(self._domains, run, training, first, second, at_shift, delays)

    def _report_progress(self) -> None:
        if time.monotonic() - self._reported < _PROGRESS_INTERVAL_S:
            return
        self._reported = time.monotonic()
        done = [*self._done, *(self._load.responses if self._load else [])]
        serve, train = self._monitor.overview.serve, self._monitor.overview.train
        rate, length = newest_rate(self._monitor.samples), acceptance_length(done[-EDGE:])
        self._say(
            f"{(time.time() - self._started) / 60:.1f} min, {self._phase}: {len(done)} requests, "
            f"{rate or 0:.0f} tokens/s, acceptance length {length or 1:.2f}, "
            f"draft depth {serve.draft_depth if serve else 0}, training step {train.step if train else 0}, "
            f"held-out acceptance length {format_number(train.acceptance_length if train else None)}, "
            f"serving {serve.speculator if serve else '-'}"
        )


def champion_arms(version: str | None) -> dict[str, NodeArm]:
    """Return speculation with a version, and no speculation."""
    return {ADAPTIVE: NodeArm(speculate=True, version=version), NONE: NodeArm(speculate=False)}


def static_arm(now: str | None, at_shift: str | None) -> dict[str, NodeArm]:
    """Return speculation with the version of the shift; without such a version it is no speculation.

    There is no such arm while that version still serves: a draft over itself would only show the noise.
    """
    if now == at_shift:
        return {}
    return {STATIC: NodeArm(speculate=at_shift is not None, version=at_shift)}


def exclude_pinned(swaps: Sequence[Swap], measuring: Sequence[Span]) -> tuple[Swap, ...]:
    """Return the swaps by which the node followed the alias: those of a measurement were pinned."""
    return tuple(swap for swap in swaps if not any(start <= swap.time <= end for start, end in measuring))
