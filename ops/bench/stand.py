"""What the figures are measured with: held-out prompts, and engines that start when a figure needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal

from ops.bench import prompted, speculator
from ops.bench.drive import Run, drive
from ops.local.stack import provide_target
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.speculator.network import EagleDraft
from serving.engines.base import Request, TraceSink
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.kernels import Kind
from trainer.data.target import Target, read_target

Draft = Literal["trained", "random"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    trials: int
    tokens: int
    """Longest answer."""
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    """Fixed draft lengths that the node's own choice is compared with; 0 is no speculation."""
    sweep_batches: tuple[int, ...]
    swaps: int
    latency_requests: int


QUICK = Plan(trials=3, tokens=24, batches=(1, 8), lengths=(0, 3), sweep_batches=(1,), swaps=20, latency_requests=12)
FULL = Plan(
    trials=5,
    tokens=64,
    batches=(1, 4, 8),
    lengths=(0, 1, 2, 3, 4, 5),
    sweep_batches=(1, 8),
    swaps=100,
    latency_requests=64,
)
_WARM_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Mode:
    """How requests are sent."""

    at_once: int = 1
    temperature: float = 0.0
    speculate: bool = True
    trace: bool = False


class Stand:
    """Prompts and engines of one benchmark run."""

    def __init__(self, settings: Settings, plan: Plan, name: str, domain: str, say: Say) -> None:
        """See that there is a target.

        Args:
            settings: Those of the node that is measured.
            plan: How much is measured.
            name: The trained speculator, as ``speculator.find`` takes it.
            domain: The one that it was trained for.
            say: Told what goes on.

        Raises:
            UserError: no target, or no such domain.
        """
        provide_target(settings.target, say)
        # The figure of a random draft is one of a random draft, whatever day 0 begins with.
        drawn = settings.speculator.model_copy(update={"init": "random"})
        settings = settings.model_copy(update={"speculator": drawn})
        self.settings, self.plan, self.name, self.domain, self.say = settings, plan, name, domain, say
        self.folder = Path(settings.target.path)
        self.tokenizer = prompted.tokenizer_of(self.folder)
        self.prompts = prompted.tokenize(self.tokenizer, prompted.held_out(domain))
        self.weights: Kind | None = None
        """Kernel of the target's matrices, once an engine runs."""
        self._engines: dict[tuple[Draft, int | None], BuiltinEngine] = {}
        self._numbers = count()

    def engine(self, draft: Draft = "trained", length: int | None = None) -> BuiltinEngine:
        """A running engine with that draft; ``length`` fixes how much it drafts, without one it chooses itself."""
        if (draft, length) not in self._engines:
            self._engines[draft, length] = self.start(draft, length=length)
        return self._engines[draft, length]

    def start(self, draft: Draft, *, length: int | None = None, sink: TraceSink | None = None) -> BuiltinEngine:
        """A running engine of the caller's own, to be stopped by it.

        All run the kernel that the first one chose: two that differ in it could not be compared.
        """
        engine = BuiltinEngine(self._settings_for(length), sink)
        self.weights = self.weights or engine.weights
        engine.start()
        if draft == "trained":
            engine.swap(self.trained, self.name)
        return engine

    @cached_property
    def trained(self) -> EagleDraft:
        """The trained speculator.

        Raises:
            UserError: there is none of that name.
        """
        return speculator.find(self.settings, self.name, self._target.line)

    @property
    def random(self) -> EagleDraft:
        """A draft that learned nothing."""
        return self._target.day_0

    @cached_property
    def _target(self) -> Target:
        return read_target(self.settings)

    def of_trial(self, trial: int, size: int) -> list[tuple[int, ...]]:
        """The prompts of a trial: the next ones of the held-out prompts, from their beginning when they are used up."""
        return [self.prompts[(trial * size + i) % len(self.prompts)] for i in range(size)]

    def request(self, prompt: tuple[int, ...], mode: Mode, seed: int = 0) -> Request:
        """A request of its own id."""
        return Request(
            id=f"bench-{next(self._numbers)}",
            prompt=prompt,
            max_tokens=self.plan.tokens,
            temperature=mode.temperature,
            seed=seed,
            label=self.domain,
            trace=mode.trace,
            speculate=mode.speculate,
        )

    def arm(self, engine: BuiltinEngine, mode: Mode) -> Callable[[int], int]:
        """Answers a prompt for each place in the batch and gives the tokens, for ``paired.interleaved``.

        The engine has met such requests before, so that what it learns of drafts and costs is not part of a trial.
        """
        self.warm(engine, mode)
        return lambda trial: self._run(engine, mode, trial, self.plan.tokens).tokens

    def warm(self, engine: BuiltinEngine, mode: Mode) -> None:
        """Let the engine meet such requests."""
        self._run(engine, mode, trial=-1, tokens=self.plan.tokens if mode.speculate else _WARM_TOKENS)

    def _run(self, engine: BuiltinEngine, mode: Mode, trial: int, tokens: int) -> Run:
        requests = [
            replace(self.request(prompt, mode, seed), max_tokens=tokens)
            for seed, prompt in enumerate(self.of_trial(trial, mode.at_once))
        ]
        answered = drive(engine, requests, mode.at_once)
        if answered.failed:
            raise UserError(f"{answered.failed} of {len(requests)} requests failed: {engine.health().error}")
        return answered

    def stop(self) -> None:
        """Stop all engines."""
        while self._engines:
            self._engines.popitem()[1].stop()

    def _settings_for(self, length: int | None) -> Settings:
        asked: dict[str, Any] = {} if self.weights is None else {"weights": self.weights}
        if length is not None:
            asked |= {"num_speculative_tokens": length, "adaptive_drafting": False}
        return self.settings.model_copy(update={"serve": self.settings.serve.model_copy(update=asked)})
