"""Engines in this process: a pool that starts them on demand, and a driver that keeps N requests running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, islice, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from ops.bench import prompts, speculator
from ops.bench.harness import Say
from ops.local.stack import provide_target
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.speculator.network import EagleDraft
from serving.engines.base import Engine, Finish, Output, Request, RequestStats, TraceSink
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.kernels import WeightDtype
from trainer.data.target import Target, read_target

DraftName = Literal["trained", "random", "day_0"]
"""The pool's trained speculator; random weights; the draft that a node begins with."""
DrafterName = Literal["eagle", "suffix", "hybrid"]
"""Values of ``serve.drafter``."""

_WARM_TOKENS = 4


@dataclass(slots=True)
class TimedOutput:
    """The outputs of one request with their times, in monotonic seconds."""

    request: Request
    submitted: float
    times: list[float] = field(default_factory=list)
    """Of each output that carried tokens."""
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: str | None = None
    stats: RequestStats | None = None

    @property
    def time_to_first_token_s(self) -> float:
        """Seconds from submission to the first token."""
        return self.times[0] - self.submitted

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Start and end of each wait between two outputs."""
        return list(pairwise(self.times))


@dataclass(frozen=True, slots=True)
class DriveResult:
    """Outputs of all requests, in the order in which they finished."""

    outputs: tuple[TimedOutput, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Number of output tokens."""
        return sum(len(output.tokens) for output in self.outputs)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second, prefill included."""
        return self.tokens / self.seconds

    @property
    def failed(self) -> int:
        """Number of requests that finished for another reason than length or an end token."""
        return sum(output.finish not in ("stop", "length") for output in self.outputs)

    @property
    def verify_steps(self) -> int:
        """Number of verify steps of all requests."""
        return sum(output.stats.verify_steps for output in self.outputs if output.stats)

    @property
    def accepted_per_step(self) -> float:
        """Accepted tokens per verify step, the bonus token excluded."""
        accepted = sum(output.stats.accepted_tokens for output in self.outputs if output.stats)
        return accepted / max(self.verify_steps, 1)

    @property
    def suffix_accepted_per_step(self) -> float:
        """The part of ``accepted_per_step`` that the suffix drafter proposed and the speculator did not."""
        accepted = sum(output.stats.suffix_accepted_tokens for output in self.outputs if output.stats)
        return accepted / max(self.verify_steps, 1)


def drive(engine: Engine, requests: Iterable[Request], concurrency: int) -> DriveResult:
    """Run the requests, ``concurrency`` of them at any time until none is left."""
    left, finished, outputs = iter(requests), SimpleQueue[TimedOutput](), []
    started = time.perf_counter()

    def submit(number: int) -> int:
        submitted = 0
        for request in islice(left, number):
            output = TimedOutput(request, time.perf_counter())
            engine.submit(request, _collector(output, finished))
            submitted += 1
        return submitted

    running = submit(concurrency)
    while running:
        outputs.append(finished.get())
        running += submit(1) - 1
    return DriveResult(tuple(outputs), time.perf_counter() - started)


def _collector(collected: TimedOutput, finished: SimpleQueue[TimedOutput]) -> Callable[[Output], None]:
    def collect(output: Output) -> None:
        if output.tokens:
            collected.times.append(time.perf_counter())
            collected.tokens.extend(output.tokens)
        if output.finish is not None:
            collected.finish, collected.error, collected.stats = output.finish, output.error, output.stats
            finished.put(collected)

    return collect


@dataclass(frozen=True, slots=True)
class RequestMode:
    """How requests are sent."""

    concurrency: int = 1
    temperature: float = 0.0
    speculate: bool = True
    trace: bool = False


class EnginePool:
    """Held-out prompts, and engines that start when a figure needs them."""

    def __init__(self, settings: Settings, name: str, domain: str, max_tokens: int, say: Say) -> None:
        """Provide the target and tokenize the prompts.

        Args:
            settings: Those of the node that is measured.
            name: The trained speculator, as ``speculator.load_speculator`` takes it.
            domain: The domain that it was trained for.
            max_tokens: Longest output.
            say: Called with one line per event.
        """
        provide_target(settings.target, say)
        self.settings = settings
        # The figure of a random draft needs a random draft, whatever the setting for day 0 is.
        untrained = settings.speculator.model_copy(update={"init": "random"})
        self._untrained = settings.model_copy(update={"speculator": untrained})
        self.name, self.domain, self.max_tokens = name, domain, max_tokens
        self.folder = Path(settings.target.path)
        self.kernel: WeightDtype | None = None
        """Kernel of the target's matrices, once an engine runs."""
        self._tokenizer = prompts.load_tokenizer(self.folder)
        self._engines: dict[tuple[DraftName, int | None, DrafterName], BuiltinEngine] = {}
        self._numbers = count()

    def engine(
        self, draft: DraftName = "trained", length: int | None = None, drafter: DrafterName | None = None
    ) -> BuiltinEngine:
        """Return a running engine with that draft.

        Args:
            draft: What the speculator begins with; a suffix drafter has none.
            length: Fixes the number of draft tokens per step.
            drafter: Replaces ``serve.drafter``; a random draft always drafts alone.
        """
        key = draft, length, self._select_drafter(draft, drafter)
        if key not in self._engines:
            self._engines[key] = self.start_engine(draft, length=length, drafter=drafter)
        return self._engines[key]

    def _select_drafter(self, draft: DraftName, drafter: DrafterName | None) -> DrafterName:
        return drafter or ("eagle" if draft == "random" else self.settings.serve.drafter)

    def start_engine(
        self,
        draft: DraftName,
        *,
        length: int | None = None,
        drafter: DrafterName | None = None,
        sink: TraceSink | None = None,
    ) -> BuiltinEngine:
        """Start an engine that the caller stops.

        All engines run the kernel that the first one selected: two with different kernels cannot be compared.
        """
        settings = self._untrained if draft == "random" else self.settings
        changed: dict[str, Any] = {"drafter": self._select_drafter(draft, drafter)}
        if self.kernel is not None:
            changed["weight_dtype"] = self.kernel
        if length is not None:
            changed |= {"num_speculative_tokens": length, "adaptive_drafting": False}
        serve = settings.serve.model_copy(update=changed)
        engine = BuiltinEngine(settings.model_copy(update={"serve": serve}), sink)
        self.kernel = self.kernel or engine.weight_dtype
        engine.start()
        if draft == "trained" and serve.drafter != "suffix":
            engine.swap(self.trained, self.name)
        return engine

    @cached_property
    def trained(self) -> EagleDraft:
        """The trained speculator. Raises ``UserError`` if there is none of that name."""
        return self.load_draft(self.name)

    @property
    def random(self) -> EagleDraft:
        """An untrained draft."""
        return self._target.day_0

    def load_draft(self, name: str) -> EagleDraft:
        """Load a cached speculator. Raises ``UserError`` if there is none of that name."""
        return speculator.load_speculator(self.settings, name, self._target.line)

    def draft_for(self, domain: str) -> str:
        """Return the name of the speculator that is cached for a domain, else that of the pool's own."""
        cached = speculator.cache_folder(self.settings, domain).exists()
        return domain if cached and domain != self.domain else self.name

    @cached_property
    def _target(self) -> Target:
        return read_target(self._untrained)

    @cached_property
    def prompts(self) -> list[tuple[int, ...]]:
        """The held-out prompts of the pool's domain."""
        return self.held_out_prompts(self.domain)

    def held_out_prompts(self, domain: str) -> list[tuple[int, ...]]:
        """Tokenize the prompts of a domain that benchmarks measure with."""
        return prompts.tokenize(self._tokenizer, prompts.held_out_prompts(domain))

    def training_prompts(self, domain: str) -> list[tuple[int, ...]]:
        """Tokenize the prompts of a domain that speculators may be trained on."""
        return prompts.tokenize(self._tokenizer, prompts.training_prompts(domain))

    def trial_prompts(self, trial: int, size: int) -> list[tuple[int, ...]]:
        """Return the next ``size`` held-out prompts, in a cycle."""
        return [self.prompts[(trial * size + i) % len(self.prompts)] for i in range(size)]

    def request(self, prompt: tuple[int, ...], mode: RequestMode, seed: int = 0) -> Request:
        """Build a request with an id of its own."""
        return Request(
            id=f"bench-{next(self._numbers)}",
            prompt=prompt,
            max_tokens=self.max_tokens,
            temperature=mode.temperature,
            seed=seed,
            label=self.domain,
            trace=mode.trace,
            speculate=mode.speculate,
        )

    def arm(self, engine: BuiltinEngine, mode: RequestMode) -> Callable[[int], int]:
        """Return an arm for ``run_alternating`` that fills the batch once and counts output tokens.

        The engine is warmed up first, so that no trial contains its learning of drafts and costs.
        """
        self.warm_up(engine, mode)
        return lambda trial: self._run_trial(engine, mode, trial, self.max_tokens).tokens

    def warm_up(self, engine: BuiltinEngine, mode: RequestMode) -> None:
        """Run such requests once."""
        self._run_trial(engine, mode, -1, self.max_tokens if mode.speculate else _WARM_TOKENS)

    def _run_trial(self, engine: BuiltinEngine, mode: RequestMode, trial: int, max_tokens: int) -> DriveResult:
        trial_prompts = self.trial_prompts(trial, mode.concurrency)
        requests = [
            replace(self.request(prompt, mode, i), max_tokens=max_tokens) for i, prompt in enumerate(trial_prompts)
        ]
        return self.run(engine, requests, mode.concurrency)

    def run(self, engine: BuiltinEngine, requests: Sequence[Request], concurrency: int) -> DriveResult:
        """Run the requests, ``concurrency`` of them at a time. Raises ``UserError`` if one fails."""
        result = drive(engine, requests, concurrency)
        if result.failed:
            raise UserError(f"{result.failed} of {len(requests)} requests failed: {engine.health().error}")
        return result

    @contextmanager
    def under_load(self, engine: BuiltinEngine, concurrency: int) -> Iterator[list[DriveResult]]:
        """Keep ``concurrency`` requests running; the list holds the result after the block."""
        ending, results = threading.Event(), list[DriveResult]()
        self.warm_up(engine, RequestMode(concurrency))
        with ThreadPoolExecutor(1) as executor:
            load = executor.submit(drive, engine, self._requests_until(ending), concurrency)
            try:
                yield results
            finally:
                ending.set()
                results.append(load.result())

    def _requests_until(self, ending: threading.Event) -> Iterator[Request]:
        for number in count():
            if ending.is_set():
                return
            yield self.request(self.prompts[number % len(self.prompts)], RequestMode(), number)

    def stop(self) -> None:
        """Stop all engines of the pool."""
        while self._engines:
            self._engines.popitem()[1].stop()
