"""Speed of a node with speculation relative to the same node without it.

A trial sends two blocks of requests: one with speculation and one without. The node answers all requests of a block
before the next block begins. Consecutive trials run their blocks in opposite order, so a drift of the machine favors
neither. A block's rate is its output tokens over the time from its first request to its last response, prefill
included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

import psutil

from ops.loadgen.load import Response

BUSY = 0.1
"""Share of the processors in other programs from which the explanation of a slowdown mentions them."""


@dataclass(frozen=True, slots=True)
class Block:
    """Responses to the requests of one block, in the order in which they ended."""

    responses: tuple[Response, ...]
    processor_s: float
    """Processor time of the node during the block, in seconds."""

    @property
    def started(self) -> float:
        """Unix time of the first request."""
        return min(response.started for response in self.responses)

    @property
    def ended(self) -> float:
        """Unix time of the last response."""
        return max(response.ended for response in self.responses)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second."""
        return self.output_tokens / (self.ended - self.started)

    @property
    def output_tokens(self) -> int:
        """Output tokens of all responses."""
        return sum(response.output_tokens for response in self.responses)


@dataclass(frozen=True, slots=True)
class Trial:
    """As many requests with speculation as without."""

    speculative: Block
    plain: Block

    @property
    def blocks(self) -> tuple[Block, Block]:
        """The block with speculation and the one without."""
        return self.speculative, self.plain

    @property
    def started(self) -> float:
        """Unix time of the first request."""
        return min(block.started for block in self.blocks)

    @property
    def responses(self) -> tuple[Response, ...]:
        """Responses of both blocks."""
        return (*self.speculative.responses, *self.plain.responses)

    @property
    def ratio(self) -> float:
        """Rate with speculation over the rate without."""
        return self.speculative.tokens_per_s / self.plain.tokens_per_s

    @property
    def processor_ratio(self) -> float:
        """The same ratio over the node's processor time: other programs change it little."""
        spent, plain_spent = self.speculative.processor_s, self.plain.processor_s
        return (self.speculative.output_tokens / spent) / (self.plain.output_tokens / plain_spent)


@dataclass(frozen=True, slots=True)
class Speedup:
    """Result of several trials: medians over them, and the range of their ratios."""

    ratio: float
    lowest: float
    highest: float
    by_processor_time: float
    tokens_per_s: float
    plain_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Yield and cost of a verify step with speculation, means over several trials."""

    accepted: float
    """Accepted tokens per step."""
    suffix_accepted: float
    """Those of them that only the suffix drafter proposed."""
    drafted: float
    """Draft tokens per step."""
    relative_time: float
    """Time of a verify step with speculation over that of one without; other work of the machine is part of both."""


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """Processor time used up to one moment, in seconds over all processors."""

    at: float
    """Monotonic time."""
    busy_s: float
    """Of all programs, since the machine's start."""
    own_s: float
    """Of this process and the running processes below it, user and system."""


def complete_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials without a failed request: only their two blocks have equal work."""
    return [trial for trial in trials if not any(response.error for response in trial.responses)]


def measure_speedup(trials: Sequence[Trial]) -> Speedup | None:
    """Return the median speed-up of the complete trials; None if there are none."""
    complete = complete_trials(trials)
    if not complete:
        return None
    ratios = [trial.ratio for trial in complete]
    return Speedup(
        ratio=median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        by_processor_time=median(trial.processor_ratio for trial in complete),
        tokens_per_s=median(trial.speculative.tokens_per_s for trial in complete),
        plain_tokens_per_s=median(trial.plain.tokens_per_s for trial in complete),
    )


def total_rates(trials: Sequence[Trial]) -> tuple[float, float] | None:
    """Return the tokens per second of all complete trials together, with and without speculation; None without any.

    Unlike a median over trials, the rates include what only one of the trials pays, such as the first measurements of
    an adaptive node.
    """
    complete = complete_trials(trials)
    if not complete:
        return None
    blocks = [trial.speculative for trial in complete], [trial.plain for trial in complete]
    with_speculation, without = (_tokens(side) / _seconds(side) for side in blocks)
    return with_speculation, without


def measure_steps(trials: Sequence[Trial]) -> StepFigures | None:
    """Return yield and cost of the verify steps of the complete trials; None without verify steps."""
    complete = complete_trials(trials)
    speculative, plain = [trial.speculative for trial in complete], [trial.plain for trial in complete]
    steps, plain_steps = _total(speculative, "verify_steps"), _total(plain, "verify_steps")
    if not steps or not plain_steps:
        return None
    return StepFigures(
        accepted=_total(speculative, "accepted_tokens") / steps,
        suffix_accepted=_total(speculative, "suffix_accepted_tokens") / steps,
        drafted=_total(speculative, "draft_tokens") / steps,
        relative_time=(_seconds(speculative) / steps) / (_seconds(plain) / plain_steps),
    )


def describe_speedup(speedup: Speedup) -> str:
    """Return the result as in ``1.40x: 58 -> 81 tokens/s``."""
    return f"{speedup.ratio:.2f}x: {speedup.plain_tokens_per_s:.0f} -> {speedup.tokens_per_s:.0f} tokens/s"


def explain_slowdown(speedup: Speedup, steps: StepFigures | None, busy: float | None) -> str | None:
    """Return why speculation was slower than none; None if it was not.

    Args:
        speedup: Result of the trials.
        steps: Yield and cost of their verify steps.
        busy: Share of the processors that other programs used meanwhile; None if unknown.
    """
    if speedup.ratio >= 1:
        return None
    reasons = []
    if steps:
        reasons.append(
            f"a verify step yields {1 + steps.accepted:.2f} tokens ({steps.suffix_accepted:.2f} from the suffix "
            f"drafter, {steps.accepted - steps.suffix_accepted:.2f} from the speculator, 1 from the target) out of "
            f"{steps.drafted:.2f} drafted, and takes {steps.relative_time:.2f} times as long as one without a draft"
        )
    if busy is not None and busy >= BUSY:
        reasons.append(
            f"other programs used {busy:.0%} of the processors (the ratio is {speedup.by_processor_time:.2f}x by the "
            "node's processor time)"
        )
    return "; ".join(reasons) or "the rates are too close to tell apart"


def read_processor_times() -> ProcessorTimes:
    """Return the processor times of now."""
    times, own = psutil.cpu_times(), psutil.Process()
    busy = sum(times) - times.idle - sum(getattr(times, name, 0.0) for name in ("iowait", "guest", "guest_nice"))
    own_s = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):  # the process has just ended
            own_s += sum(process.cpu_times()[:2])
    return ProcessorTimes(time.monotonic(), busy, own_s)


def other_programs(before: ProcessorTimes, now: ProcessorTimes, processors: int) -> float:
    """Return the share of the processors that other programs used between two moments, from 0 to 1."""
    others = (now.busy_s - before.busy_s) - (now.own_s - before.own_s)
    return min(max(others / ((now.at - before.at) * processors), 0.0), 1.0)


def _tokens(blocks: Sequence[Block]) -> int:
    return sum(block.output_tokens for block in blocks)


def _seconds(blocks: Sequence[Block]) -> float:
    return sum(block.ended - block.started for block in blocks)


def _total(blocks: Sequence[Block], figure: str) -> int:
    return sum(getattr(response, figure) for block in blocks for response in block.responses)
