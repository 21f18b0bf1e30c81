"""The course of ``aurora bench loop`` on a stack that runs: learn, pause and measure, in one domain and in another."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

from ops.bench import prompts as bench_prompts
from ops.bench.loop_arms import Arm, Measured, Node, Plan, compare
from ops.bench.loop_served import Span, Waits, read_rows, read_served, waits
from ops.demo.record import EDGE, DemoRun, Swap, acceptance_length
from ops.demo.stack_monitor import StackMonitor, build_version_records, newest_rate, read_versions
from ops.loadgen.load import Load, Prompt, Response
from ops.local.stack import Say, Stack
from schemas.errors import UserError
from schemas.settings import DAY_0

YOUNG_S = 120.0
"""Rows of the last seconds of learning that do not count: twice the goal for the wait."""
ADAPTIVE, STATIC, NONE = "adaptive", "static", "none"
"""Arms: the version that the loop has come to, the one that was champion at the shift, and no speculation."""
_TOLD_S = 15.0
_LAST_ANSWERS_S = 180.0
_SETTLE_S = 30.0
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Size:
    """How long and how much."""

    minutes: tuple[float, float]
    """Learning in the first domain, and in the second."""
    concurrency: int
    """Requests of the traffic at a time."""
    max_tokens: int
    alone: int
    """Trials with one request at a time."""
    loaded: int
    """Trials with as many requests at a time as the traffic has."""
    training: int
    """Trials while the trainer runs."""


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that the figures are made from."""

    domains: tuple[str, str]
    run: DemoRun
    training: Measured
    """The first domain, at the traffic's concurrency, beside a trainer that runs."""
    first: tuple[Measured, ...]
    """The first domain with the trainer paused: one request at a time, then the traffic's concurrency if it is more."""
    second: tuple[Measured, ...]
    """The same of the second domain."""
    at_shift: str | None
    """The champion when the second domain began; None if there was none."""
    waits: Waits


class Course:
    """One run through two domains."""

    def __init__(self, stack: Stack, domains: tuple[str, str], size: Size, say: Say) -> None:
        self._stack, self._domains, self._size, self._say = stack, domains, size, say
        self._watch = StackMonitor(stack, self._tell)
        self._began = time.time()
        self._phase = "starting"
        self._told = 0.0
        self._load: Load | None = None
        self._done: list[Response] = []
        self._learning: list[Span] = []
        self._measuring: list[Span] = []

    def run(self) -> Record:
        """Run it."""
        texts = {
            name: (bench_prompts.training_prompts(name), bench_prompts.held_out_prompts(name)) for name in self._domains
        }
        traffic = {name: cycle([Prompt(name, text) for text in learned]) for name, (learned, _) in texts.items()}
        held_out = {name: [Prompt(name, text) for text in kept] for name, (_, kept) in texts.items()}
        one, other = self._domains
        try:
            self._stack.start()
            self._node = self._reach_node()
            self._learn(one, traffic[one], self._size.minutes[0])
            training = self._beside_the_trainer(list(islice(traffic[one], self._loaded.size * self._size.training)))
            at_shift = self._pause()
            first = self._measure(held_out[one], arms(at_shift))
            self._go_on()
            self._learn(other, traffic[other], self._size.minutes[1])
            now = self._pause()
            second = self._measure(held_out[other], arms(now) | static(now, at_shift))
            return self._record(training, first, second, at_shift)
        finally:
            if self._load:
                self._load.abandon()
            self._watch.close()

    def _reach_node(self) -> Node:
        pid = self._stack.supervisor.parts["serve"].part.process.pid
        assert pid is not None, "a stack that started has a node"
        return Node(self._stack.settings, pid, self._size.max_tokens)

    def _learn(self, domain: str, prompts: Iterator[Prompt], minutes: float) -> None:
        """Send traffic of a domain for so long, and leave the rest to the loop."""
        self._learning.append((time.time(), float("inf")))
        self._phase = f"learning {domain}"
        self._load = load = self._node.load(prompts, self._size.concurrency)
        load.start()
        self._watch.run_until(lambda: False, minutes * 60)
        load.stop()
        self._watch.run_until(lambda: not load.running, _LAST_ANSWERS_S)
        self._done += load.responses
        self._load = None

    def _beside_the_trainer(self, prompts: Sequence[Prompt]) -> Measured:
        """Traffic as before, with speculation and without in turn; the trainer goes on."""
        self._say("measuring while the trainer runs")
        arms = {ADAPTIVE: Arm(speculate=True), NONE: Arm(speculate=False)}
        return compare(self._node, arms, prompts, replace(self._loaded, trials=self._size.training, trace=True))

    def _pause(self) -> str | None:
        """Stop the trainer, and let what it has registered come to the node; the version that serves then."""
        self._phase = "paused"
        self._say("stopping the trainer to measure")
        self._stack.supervisor.stop(["train"])
        promoter, serve = self._stack.settings.promoter, self._stack.settings.serve
        settled = time.monotonic() + promoter.poll_interval + serve.poll_interval + _LOOK_S
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < settled or (not self._serves_champion and time.monotonic() < deadline):
            time.sleep(_LOOK_S)
            self._watch.sample()
        self._learning[-1] = (self._learning[-1][0], time.time())
        serving = self._watch.overview.serve
        if serving is None:
            raise UserError(f"the node does not answer: {self._watch.overview.silent.get('serve')}")
        return None if serving.speculator.startswith(DAY_0) else serving.speculator

    @property
    def _serves_champion(self) -> bool:
        serve, promoter = self._watch.overview.serve, self._watch.overview.promoter
        return serve is not None and promoter is not None and promoter.champion in (None, serve.speculator)

    def _measure(self, prompts: Sequence[Prompt], arms: Mapping[str, Arm]) -> tuple[Measured, ...]:
        """Held-out prompts, untraced, one request at a time and then as many as the traffic has."""
        alone = Plan(1, self._size.alone, 2)
        plans = [alone, self._loaded] if self._size.concurrency > 1 else [alone]
        found, began = [], time.time()
        for plan in plans:
            self._say(f"measuring {', '.join(arms)} on held-out prompts, {plan.at_once} at a time")
            found.append(compare(self._node, arms, prompts, plan))
            self._say(
                ", ".join(f"{name} {rates.tokens_per_s}" for name, rates in found[-1].rates.items()) + " tokens/s"
            )
        self._measuring.append((began, time.time()))
        return tuple(found)

    def _go_on(self) -> None:
        """Follow the alias again, and start the trainer where it stood."""
        self._node.unpin()
        self._say("starting the trainer again")
        self._stack.start()

    @property
    def _loaded(self) -> Plan:
        return Plan(self._size.concurrency, self._size.loaded, 2 * self._size.concurrency)

    def _record(
        self, training: Measured, first: tuple[Measured, ...], second: tuple[Measured, ...], at_shift: str | None
    ) -> Record:
        self._watch.sample()
        serve, settings = self._watch.overview.serve, self._stack.settings
        assert serve is not None, "it has just answered"
        swaps = followed([Swap(s.version, s.time, s.in_flight, s.pause_ms) for s in serve.swaps], self._measuring)
        registered, promoted = read_versions(settings, serve.line)
        rows = read_rows(settings, serve.line, self._began)
        run = DemoRun(
            started=self._began,
            ended=time.time(),
            requests=tuple(self._done),
            samples=tuple(self._watch.samples),
            swaps=swaps,
            versions=build_version_records(self._began, registered, promoted, swaps),
        )
        waited = waits(rows, read_served(settings, registered, swaps), self._learning, YOUNG_S)
        return Record(self._domains, run, training, first, second, at_shift, waited)

    def _tell(self) -> None:
        """A line every few seconds."""
        if time.monotonic() - self._told < _TOLD_S:
            return
        self._told = time.monotonic()
        done = [*self._done, *(self._load.responses if self._load else [])]
        serve, train = self._watch.overview.serve, self._watch.overview.train
        rate, length = newest_rate(self._watch.samples), acceptance_length(done[-EDGE:])
        self._say(
            f"{(time.time() - self._began) / 60:.1f} min, {self._phase}: {len(done)} requests, "
            f"{rate or 0:.0f} tokens/s, acceptance length {length or 1:.2f}, "
            f"drafting {serve.draft_depth if serve else 0}, step {train.step if train else 0}, "
            f"held-out {(train.acceptance_length if train else 0) or 0:.2f}, "
            f"serving {serve.speculator if serve else '-'}"
        )


def arms(version: str | None) -> dict[str, Arm]:
    """Speculation with a version, and none."""
    return {ADAPTIVE: Arm(speculate=True, version=version), NONE: Arm(speculate=False)}


def static(now: str | None, at_shift: str | None) -> dict[str, Arm]:
    """Speculation with the version of the shift; where there was none yet, that is as if there were no speculation.

    None while that version still serves: a draft over itself would only show the noise.
    """
    if now == at_shift:
        return {}
    return {STATIC: Arm(speculate=at_shift is not None, version=at_shift)}


def followed(swaps: Sequence[Swap], measuring: Sequence[Span]) -> tuple[Swap, ...]:
    """The swaps by which the node followed the alias: those of a measurement were pinned."""
    return tuple(swap for swap in swaps if not any(start <= swap.time <= end for start, end in measuring))
