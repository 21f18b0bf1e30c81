"""The engine protocol: generate with a trace sink, swap the draft, report health.

An engine runs its verify steps on its own thread and calls every callback from that thread. A callback must return at
once: the HTTP API hands an output to its event loop, and the trace publisher puts a verify step into its queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from schemas.speculator.network import EagleDraft
from schemas.trace.record import VerifyStep

if TYPE_CHECKING:
    from serving.engines.builtin.grammar import Grammar

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to continue it: one sequence. The HTTP API submits one for each choice."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    """Maximum number of output tokens; the engine's limit on prompt and output together also applies. A request with 0
    ends after its prefill."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0 samples from all."""
    min_p: float = 0.0
    """Sample from the tokens that are at least this many times as likely as the likeliest one."""
    seed: int | None = None
    """Decides a sampled output, together with the target and the other fields; None is a random seed."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it is in the output."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit if it is in the output."""
    repetition_penalty: float = 1.0
    """Divides a positive logit, and multiplies a negative one, of a token that is in prompt or output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens."""
    allowed_token_ids: frozenset[int] | None = None
    """The only tokens that the output may contain; None allows all."""
    min_tokens: int = 0
    """Minimum number of output tokens before a token ends the output."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the output, in addition to the target's EOS tokens."""
    grammar: Grammar | None = None
    """What the output must match."""
    ignore_eos: bool = False
    """Whether to continue after the target's EOS tokens."""
    logprobs: int | None = None
    """Number of alternatives to report with each output token; None reports no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt after the first. The target then reads the whole prompt."""
    label: str | None = None
    prompt_key: str | None = None
    """Hash of the first user message; None if the messages are not known."""
    cache_salt: str | None = None
    """Separates the request's cached prefixes from those of requests with another one."""
    group: str | None = None
    """Name that the choices of one request have in common; None for a single choice."""
    trace: bool = True
    speculate: bool = True


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The target's log-probabilities at one token, before logits processors, temperature, top-k and top-p."""

    logprob: float
    """Log-probability of the token itself."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with their log-probabilities, best first: as many as the request asks for."""


@dataclass(frozen=True, slots=True)
class Output:
    """The output of one verify step. The last output of a request carries ``finish`` and ``stats``."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of ``tokens`` if the request asks for log-probabilities, else empty."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the next tokens of the prompt, in prefill, if the request asks for them."""
    finish: Finish | None = None
    """With ``stop`` the last token is the end token or stop token."""
    error: str | None = None
    stats: RequestStats | None = None


@dataclass(frozen=True, slots=True)
class RequestStats:
    """How a request was decoded. ``accepted_tokens / verify_steps`` is the accepted tokens per step, bonus excluded."""

    verify_steps: int
    """Verify steps, without prefill."""
    draft_tokens: int
    accepted_tokens: int
    speculators: tuple[str, ...]
    """Versions that drafted for the request, in order; empty without speculation."""
    suffix_accepted_tokens: int = 0
    """Accepted tokens that the suffix drafter proposed and the speculator did not."""
    cached_tokens: int = 0
    """Prompt tokens from the prefix cache."""
    queue_s: float | None = None
    """Seconds for which the request waited for a slot; None if the engine does not know, or it never had one."""


@dataclass(frozen=True, slots=True)
class SwapResult:
    """A completed hot swap of the draft."""

    version: str
    in_flight: int
    """Requests that were running; the swap drops none of them."""
    pause_ms: float
    """Time without a verify step."""


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Counters since the start, and the current state."""

    alive: bool
    speculator: str
    """Version that drafts; reported also while speculation is off."""
    speculating: bool
    """Whether the operator allows speculation. ``draft_depth`` shows how much the engine chooses to draft."""
    draft_depth: int
    """Draft tokens of the speculator per sequence, one after the other; 0 while its drafts do not pay."""
    expected_tokens_per_second: tuple[float, ...]
    """Expected output tokens per second, the reason for ``draft_depth``: entry 0 without drafts, entry n with drafts of
    the speculator up to depth n."""
    requests_running: int
    requests_waiting: int
    verify_steps: int
    draft_tokens: int
    accepted_tokens: int
    output_tokens: int
    suffix_draft_tokens: int = 0
    """Draft tokens that the suffix drafter proposed and the speculator did not."""
    suffix_accepted_tokens: int = 0
    drafter_failures: int = 0
    """Failures of a drafter; each turned speculation off."""
    speedup: float | None = None
    """Recent output rate over the expected rate without drafts; None if the engine does not know."""
    decoding_s: float = 0.0
    """Seconds of verify steps that drafted or could draft, and read no prompt."""
    undrafted_s: float = 0.0
    """Expected seconds of the same output without drafts."""
    error: str | None = None
    """Why the engine failed."""


class TraceSink(Protocol):
    """Receives the verify steps of requests that may be traced. Never blocks and never raises."""

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        """Record the next verify steps of a request; ``finish`` accompanies the last ones."""


class AnswerSink(Protocol):
    """Receives finished answers to requests that may be traced. Never blocks and never raises."""

    def publish(self, request: Request, output: Sequence[int]) -> None:
        """Take the complete output of a request."""


class HotSwapEngine(Protocol):
    """An engine whose draft can be swapped while it serves. The version poller and the admin API need no more."""

    @property
    def target(self) -> str:
        """Fingerprint of the target."""

    @property
    def line(self) -> str:
        """Speculator line of the drafts that ``swap`` accepts."""

    def check(self, draft: EagleDraft) -> None:
        """Draft a few tokens with the given weights, outside the serving path.

        Raises:
            CheckpointError: the draft produces values that are not finite.
        """

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
        """Swap in checked weights between two verify steps; block until done. No request is dropped."""

    def speculate(self, *, on: bool) -> None:
        """Turn speculation on or off for all requests, from the next verify step on.

        Raises:
            SpeculationFixedError: the engine cannot change it while it runs.
        """

    def health(self) -> EngineHealth:
        """Return counters and state; callable at any time."""


class Engine(HotSwapEngine, Protocol):
    """A decoding engine with speculation."""

    @property
    def vocabulary(self) -> int:
        """Size of the target's vocabulary: every token id is below it."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an output."""

    @property
    def max_tokens(self) -> int:
        """Maximum length of a request, prompt and output together."""

    def start(self) -> None:
        """Start to run verify steps."""

    def stop(self) -> None:
        """Stop; running requests finish with ``cancelled``."""

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Queue a request.

        Raises:
            EngineFullError: the queue of waiting requests is full.
        """

    def cancel(self, request_id: str) -> None:
        """End a request before its next verify step. Ignore unknown ids: their requests have ended."""


class EngineFullError(RuntimeError):
    """The queue of waiting requests is full, or the engine has stopped."""


class SpeculationFixedError(RuntimeError):
    """The engine cannot turn speculation on or off while it runs; the message names the setting that fixed it."""
