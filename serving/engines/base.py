"""What the node asks of an engine: generate with a trace sink, swap the draft, say how it is.

An engine runs its verify steps on a thread of its own. Callbacks come from that thread and must return at once: the
API hands
an output over to its event loop, the publisher puts a verify step into its queue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from schemas.speculator.network import EagleDraft
from schemas.trace.record import VerifyStep

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    """Longest answer, in tokens; the engine also ends a request at its own limit for prompt and answer together."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Draw from this many likeliest tokens only; 0 draws from all."""
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, beside the target's own end tokens."""
    ignore_eos: bool = False
    """The target's own end tokens do not end the answer."""
    logprobs: int | None = None
    """Alternatives to report for every answered token; None reports no log-probabilities at all."""
    label: str | None = None
    trace: bool = True
    speculate: bool = True


@dataclass(frozen=True, slots=True)
class Scored:
    """The target's log-probabilities at one answered token, before temperature, top-k and nucleus."""

    logprob: float
    """Of the token itself."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, best first; as many as ``Request.logprobs`` asks for."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one verify step added to an answer; the last one of a request carries ``finish`` and the figures of the
    whole.
    """

    tokens: tuple[int, ...]
    scores: tuple[Scored, ...] = ()
    """One for each of ``tokens`` where the request asks for log-probabilities, else empty."""
    finish: Finish | None = None
    error: str | None = None
    figures: Figures | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """How a request was decoded. Accepted tokens per step is ``accepted / verify_steps``: the bonus token is not in
    it.
    """

    verify_steps: int
    """Verify steps, the prefill not counted."""
    drafted: int
    accepted: int
    speculators: tuple[str, ...]
    """Versions that drafted for the request, in order; empty without speculation."""


@dataclass(frozen=True, slots=True)
class Swapped:
    """A draft that took its place between two verify steps."""

    version: str
    in_flight: int
    """Requests that were being decoded; none of them is lost."""
    pause_ms: float
    """Time for which the verify steps stood still."""


@dataclass(frozen=True, slots=True)
class Health:
    """Counters since the start, and what runs now."""

    alive: bool
    speculator: str
    """Version that drafts; kept while speculation is off."""
    speculating: bool
    """Whether the operator lets the engine draft; how much it drafts is the engine's own measured choice."""
    draft_depth: int
    """That choice: tokens a request, one after the other; 0 while drafting does not pay."""
    expected_rates: tuple[float, ...]
    """What it rests on: expected output tokens per second with 0, 1, .. drafted tokens a request."""
    running: int
    waiting: int
    verify_steps: int
    drafted: int
    accepted: int
    output_tokens: int
    error: str | None = None
    """Why the engine stopped, if it did."""


class TraceSink(Protocol):
    """Takes the verify steps of requests that may be traced. Never blocks, never raises."""

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        """Take the next verify steps of a request; ``finish`` comes with the last ones."""


class Drafting(Protocol):
    """What drafts, as those see it who decide which version does."""

    @property
    def target(self) -> str:
        """Fingerprint of the target."""

    @property
    def line(self) -> str:
        """Speculator line of the drafts that ``swap`` takes."""

    def check(self, draft: EagleDraft) -> None:
        """Smoke-draft with the given weights, off the serving path.

        Raises:
            CheckpointError: the draft gives values that are not finite.
        """

    def swap(self, draft: EagleDraft, version: str) -> Swapped:
        """Put checked weights in place between two verify steps, without dropping a request; blocks the caller until
        then.
        """

    def speculate(self, *, on: bool) -> None:
        """Let running and coming requests be drafted for, or stop it, from the next verify step on.

        Raises:
            FixedError: this was settled at the start.
        """

    def health(self) -> Health:
        """Counters and state, at any time."""


class Engine(Drafting, Protocol):
    """A decoding engine with speculation."""

    @property
    def vocabulary(self) -> int:
        """Size of the target's vocabulary: every token id is below it."""

    @property
    def max_tokens(self) -> int:
        """Longest request, prompt and answer together."""

    def start(self) -> None:
        """Begin to run verify steps."""

    def stop(self) -> None:
        """End the verify steps; running requests finish with ``cancelled``."""

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Queue a request.

        Raises:
            EngineFullError: as many requests wait as the settings allow.
        """

    def cancel(self, request_id: str) -> None:
        """End a request before its next verify step; unknown ids are those that ended already."""


class EngineFullError(RuntimeError):
    """No more requests can wait."""


class FixedError(RuntimeError):
    """The engine cannot change this while it runs; the message says where it was settled."""
