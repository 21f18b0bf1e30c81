"""How much to draft, and with which drafter: the drafts with the highest expected throughput on this node.

In a verify step every sequence drafts zero or more tokens, and the target verifies all of them in one forward. Whether
drafting pays depends on the latency of a forward with more rows, on the latency of the speculator's draft steps, and on
how often the target accepts. The planner measures all three while the node serves, and plans the next verify step with
them (``latency_model``, ``acceptance_model``).

**Price.** A verify step that takes a second longer costs the tokens that the node puts out in a second. The planner
averages this throughput over recent verify steps, for each number of decoding sequences. A draft token is worth a row,
and a draft step is worth its time, if the expected tokens exceed the price.

**Acceptance.** Greedy and sampled sequences have acceptance rates of their own. A swap discards those of the version
before.

**Selection.** Suffix drafts cost next to nothing, so every sequence has one in every verify step. Draft tokens of all
sequences together are ordered by acceptance probability; the target verifies as many of them as pay, up to the row
where the forward becomes too expensive.

**Speculator.** What the speculator adds depends on what the suffix drafter has found already. The planner measures how
deep the speculator's drafts are accepted next to suffix drafts of similar confidence, and how often those reach deeper.
The speculator drafts for those sequences, and to that depth, for which its tokens are worth more than the suffix tokens
that they displace, the rows, and the draft steps. Its drafts grow only while a further token pays (the threshold policy
of SpecDec++, Huang et al., arXiv 2405.19715, with thresholds from measured latency).

**Probes.** The speculator's acceptance is measured only where it drafts. While its drafts do not pay, one sequence
drafts every now and then as a probe: rarely while probes are rejected, soon after a swap or an accepted probe. While
its drafts are shorter than the limit, every twelfth verify step drafts one token more than planned. Suffix drafts need
no probes: they are compared with the output also where they were not verified.

**Prefill.** The target reads prompts next to running answers, and so does the speculator before it drafts from them.
What both read in one verify step takes ``serve.max_prefill_stall`` at most. The speculator does not draft for a
sequence before it has read all of it.

This module does no I/O and needs no torch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from schemas.trace.record import DraftSource
from serving.planner.acceptance_model import (
    AcceptanceModel,
    DraftOutcome,
    SpeculatorEstimate,
    SpeculatorModel,
    SpeculatorOutcome,
    confidence_group,
)
from serving.planner.latency_model import F64, ForwardTiming, LatencyModel
from serving.planner.speedup import Speedup

_STEPS_RATE = 0.05
_PRICE_RATE = 0.03
_PROBE_WEIGHT = 8.0
"""Outcomes that one outcome of a probe counts as: it stands for all verify steps since the probe before."""

_EXPLORED_LOSS = 0.02
"""Share of the output that the speculator's drafts may be expected to cost: so little is within the noise of the
estimates, and only drafts correct them."""
_DEEPER_INTERVAL = 12
_PROBE_DEPTH = 2
_MIN_PROBE_INTERVAL = 4
_MAX_PROBE_INTERVAL = 32
"""Verify steps between probes; the interval doubles from the minimum to the maximum."""
_MIN_CATCH_UP = 16
"""Tokens that the speculator may read in any case, so that it catches up with answers that grow meanwhile."""


@dataclass(frozen=True, slots=True)
class DraftBudget:
    """How much the speculator may draft for its sequences in one verify step."""

    depth: int
    """Maximum depth of a draft tree; 0 drafts nothing."""
    draft_threshold: float = 0.0
    """Minimum acceptance probability of a token for which drafting and verifying it pays."""
    verify_threshold: float = 0.0
    """Minimum acceptance probability of a draft token for which verifying it pays."""
    sibling_threshold: float = math.inf
    """Minimum acceptance probability of a sibling, a token that no further draft step continues. The default drafts no
    siblings."""


class DraftPlan(NamedTuple):
    """Which of the sequences the speculator drafts for, and how much."""

    drafting: Sequence[int]
    """Indices of the sequences."""
    budget: DraftBudget
    catch_up: Mapping[int, int] = {}
    """How many of the tokens to catch up on it reads, by index. Where it does not read all, it does not draft."""


class SequenceOutlook(NamedTuple):
    """What the planner knows of a sequence before the speculator drafts."""

    greedy: bool
    chances: Sequence[float] = ()
    """Acceptance probability of each token of the suffix draft, in descending order."""
    catch_up: int = 0
    """Committed tokens that the speculator has not read, beyond those of one verify step."""

    @property
    def confidence(self) -> float:
        """Acceptance probability of the likeliest token of the suffix draft."""
        return self.chances[0] if self.chances else 0.0

    @property
    def group(self) -> int:
        """The group of suffix drafts with a similar confidence."""
        return confidence_group(self.confidence)


class Planner:
    """Plans verify steps from measurements.

    Args:
        latency: Latency model of this machine, calibrated at start.
        max_depth: Maximum depth of the speculator's draft trees.
        adaptive: Whether to adapt the drafts; False drafts to ``max_depth`` and verifies all in every verify step.
        max_prefill_stall: Seconds by which the reading of prompts may extend a verify step of decoding sequences.
    """

    def __init__(
        self, latency: LatencyModel, max_depth: int, *, adaptive: bool = True, max_prefill_stall: float = math.inf
    ) -> None:
        self._latency, self._max_depth, self._adaptive = latency, max_depth, adaptive
        self._max_prefill_stall = max_prefill_stall
        self.suffix: Mapping[bool, AcceptanceModel] = {greedy: AcceptanceModel() for greedy in (True, False)}
        """Acceptance of the suffix drafter's tokens in greedy sequences (True) and in sampled ones (False)."""
        self.speedup = Speedup(latency)
        self._prices: dict[int, _Throughput] = {}
        self._until_deeper = _DEEPER_INTERVAL
        self._steps_per_depth = 1.0
        """Latency of the speculator's drafts, which may end early, over that of drafts to their maximum depth."""
        self.depth = 0 if adaptive else max_depth
        """Depth of the last plan, 0 while the speculator's drafts do not pay; deeper draft tokens are a probe."""
        self.throughput: tuple[float, ...] = ()
        """The reason for it: expected tokens per second without drafts, and with speculator drafts of depth 1, 2, .."""
        self.start_version()

    def start_version(self) -> None:
        """Forget the acceptance of the speculator's drafts, and probe in the next verify step."""
        self.speculator: Mapping[bool, AcceptanceModel] = {greedy: AcceptanceModel() for greedy in (True, False)}
        self._drafts = {greedy: SpeculatorModel(self._max_depth) for greedy in (True, False)}
        self._until_probe = self._probe_interval = 1

    def limit_suffix_drafts(self, decoding: int) -> float:
        """Return the acceptance probability below which no suffix draft token can be worth a row.

        Args:
            decoding: Number of decoding sequences.
        """
        if not self._adaptive:
            return 0.0
        plain = self._latency.predict_verify(decoding, decoding)
        cheapest = min((self._latency.predict_verify(decoding, decoding + rows) - plain) / rows for rows in (1, 4, 8))
        return self._price(decoding) * max(cheapest, 0.0)

    def plan(self, decoding: int, outlooks: Sequence[SequenceOutlook]) -> DraftPlan:
        """Return which of the sequences the speculator drafts for, and its budget.

        Args:
            decoding: Number of decoding sequences, those that may not draft included.
            outlooks: Outlook of each sequence that may draft.
        """
        plan = self._choose_drafts(decoding, outlooks)
        left = max(self._limit_catch_up(), _MIN_CATCH_UP)
        drafting, catch_up = [], {}
        # Those with the least to read first, so that most can draft.
        for i in sorted(plan.drafting, key=lambda i: outlooks[i].catch_up):
            if rows := min(outlooks[i].catch_up, left):
                catch_up[i] = rows
                left -= rows
            if rows == outlooks[i].catch_up:
                drafting.append(i)
        if plan.drafting and not drafting and not self.depth:
            # The probe is to follow when its sequence is read.
            self._until_probe, self._probe_interval = 1, self._probe_interval // 2
        return DraftPlan(drafting, plan.budget, catch_up)

    def _choose_drafts(self, decoding: int, outlooks: Sequence[SequenceOutlook]) -> DraftPlan:
        if not self._adaptive or not outlooks:
            return DraftPlan(range(len(outlooks)), DraftBudget(self._max_depth if outlooks else 0))
        suffixes = [np.asarray(outlook.chances, np.float64) for outlook in outlooks]
        estimates = self._estimate_drafts(outlooks)
        row_prices = self._price_rows(decoding, 1 + sum(map(len, suffixes)) + len(outlooks) * self._max_depth)
        without = self._evaluate(np.concatenate(suffixes), row_prices)
        price, plain = self._price(decoding), self._latency.predict_verify(decoding, decoding)
        best = _Option(0, (), without.value - _EXPLORED_LOSS * (decoding + without.tokens), without.rows)
        throughput = [decoding / plain]
        for depth in range(1, self._max_depth + 1):
            rate = 0.0
            for drafting in _rank(estimates, depth):
                drafts = list(suffixes)
                for i in drafting:
                    drafts[i] = suffixes[i] * estimates[i].exceeded
                    drafts.append(np.asarray(estimates[i].reached[:depth]))
                verified = self._evaluate(np.concatenate(drafts), row_prices)
                value = verified.value - price * self._steps_per_depth * self._latency.predict_draft(
                    len(drafting), depth
                )
                rate = max(rate, (decoding + verified.tokens) / (plain + (verified.tokens - value) / price))
                if value > best.value:
                    best = _Option(depth, drafting, value, verified.rows)
            throughput.append(rate)
        self.depth = best.depth
        self.throughput = tuple(rate / self._latency.pace for rate in throughput)
        if not best.depth:
            return self._plan_probe(outlooks)
        self._until_probe = self._probe_interval = _MIN_PROBE_INTERVAL
        return DraftPlan(best.drafting, self._limit_speculator(len(best.drafting), price, row_prices, best.rows))

    def select(self, decoding: int, chances: Sequence[float]) -> int:
        """Return how many of the candidates the target verifies.

        Args:
            decoding: Number of decoding sequences.
            chances: Acceptance probability of each candidate, in descending order.
        """
        if not self._adaptive:
            return len(chances)
        row_prices = self._price_rows(decoding, 1 + len(chances))
        return self._evaluate(np.asarray(chances, np.float64), row_prices).rows

    def limit_prompt_rows(self, *, decode_rows: int, max_rows: int, catch_up: int = 0) -> int:
        """Return how many prompt rows extend a verify step by the allowed stall at most; at least 1.

        Args:
            decode_rows: Rows of the forward for decoding sequences.
            max_rows: Maximum to return.
            catch_up: Tokens that the speculator catches up with in the same verify step.
        """
        without = self._latency.predict_verify(1, decode_rows)
        rows = bisect.bisect_right(
            range(1, max_rows + 1),
            self._max_prefill_stall / self._latency.pace - catch_up * self._latency.catch_up_row,
            key=lambda rows: self._latency.predict_verify(1, decode_rows + rows) - without,
        )
        return max(rows, 1)

    def observe_drafts(self, outcomes: Iterable[DraftOutcome], speculator: Sequence[SpeculatorOutcome]) -> None:
        """Learn from the outcomes of the drafts of one verify step."""
        probing = not self.depth
        for outcome in outcomes:
            if outcome.source is DraftSource.SUFFIX:
                self.suffix[outcome.greedy].update(outcome)
            else:
                self.speculator[outcome.greedy].update(outcome, _PROBE_WEIGHT if probing else 1.0)
        for draft in speculator:
            # Sequences of one verify step count less than as many verify steps: the memory is also one of time.
            weight = _PROBE_WEIGHT if draft.drafted_depth > self.depth else len(speculator) ** -0.5
            self._drafts[draft.greedy].update(draft, weight)
            if draft.speculator_tokens > self.depth:
                self._until_probe = self._probe_interval = _MIN_PROBE_INTERVAL

    def observe_latency(
        self,
        plan: DraftPlan,
        tokens: int,
        verify: ForwardTiming,
        draft_steps: Sequence[ForwardTiming],
    ) -> None:
        """Learn from the durations of one verify step without prompt rows.

        Args:
            plan: The speculator's plan.
            tokens: Output tokens of the verify step.
            verify: The target's forward.
            draft_steps: The draft steps in order.
        """
        latency = self._latency
        seconds = latency.predict_verify(verify.sequences, verify.rows)
        limit = len(plan.drafting) * plan.budget.depth
        if draft_steps and limit:
            drafting = sum(latency.predict_step(timing.sequences, step) for step, timing in enumerate(draft_steps))
            seconds += drafting
            steps = drafting / latency.predict_draft(len(plan.drafting), plan.budget.depth)
            self._steps_per_depth += _STEPS_RATE * (steps - self._steps_per_depth)
        self._throughput(verify.sequences).update(tokens, seconds)
        latency.update_verify(verify)
        if self.depth and not plan.catch_up:
            # A probe's first draft step also reads the tokens committed since the last one, which is not its price.
            latency.update_draft(draft_steps)

    def _limit_catch_up(self) -> int:
        """Return how many tokens the speculator can read in the time that a verify step has for prompts."""
        seconds = self._latency.pace * self._latency.catch_up_row
        return int(min(self._max_prefill_stall / seconds, 2**31)) if seconds else 2**31

    def _price(self, decoding: int) -> float:
        """Return the output tokens that a second is worth, at pace 1."""
        return self._throughput(decoding).rate

    def _throughput(self, decoding: int) -> _Throughput:
        if decoding not in self._prices:
            self._prices[decoding] = _Throughput(decoding, self._latency.predict_verify(decoding, decoding))
        return self._prices[decoding]

    def _price_rows(self, decoding: int, count: int) -> F64:
        """Return [count] the price of 0, 1, .. draft tokens in one forward."""
        seconds = self._latency.predict_rows(decoding, count)
        prices: F64 = self._price(decoding) * (seconds - seconds[0])
        return prices

    def _evaluate(self, expected: F64, row_prices: F64) -> _Selection:
        """Return the selection of draft tokens with the highest value.

        Args:
            expected: Expected output tokens of each draft token.
            row_prices: Price of 0, 1, .. draft tokens.
        """
        tokens = np.concatenate(([0.0], np.sort(expected)[::-1])).cumsum()
        values = tokens - row_prices[: len(tokens)]
        best = int(values.argmax())
        return _Selection(float(values[best]), float(tokens[best]), best)

    def _estimate_drafts(self, outlooks: Sequence[SequenceOutlook]) -> list[SpeculatorEstimate]:
        """Return what is expected of the speculator's draft for each sequence; one object for similar sequences."""
        kinds = [(outlook.greedy, outlook.group) for outlook in outlooks]
        estimates = {
            kind: self._drafts[outlook.greedy].estimate(outlook.confidence)
            for kind, outlook in dict(zip(kinds, outlooks, strict=True)).items()
        }
        return [estimates[kind] for kind in kinds]

    def _limit_speculator(self, drafting: int, price: float, row_prices: F64, rows: int) -> DraftBudget:
        """Return the budget of the planned depth, or now and then of one token more."""
        first = max(rows - drafting, 0)
        row = max(float(row_prices[rows] - row_prices[first]) / max(rows - first, 1), 0.0)
        self._until_deeper -= 1
        if self._until_deeper <= 0 and self.depth < self._max_depth:
            self._until_deeper = _DEEPER_INTERVAL
            return DraftBudget(self.depth + 1, sibling_threshold=row)
        step = price * self._latency.predict_step(drafting, 1) / drafting
        return DraftBudget(self.depth, max(step + row, 0.0), row, row)

    def _plan_probe(self, outlooks: Sequence[SequenceOutlook]) -> DraftPlan:
        self._until_probe -= 1
        if self._until_probe > 0:
            return DraftPlan((), DraftBudget(0))
        self._probe_interval = min(2 * max(self._probe_interval, _MIN_PROBE_INTERVAL // 2), _MAX_PROBE_INTERVAL)
        self._until_probe = self._probe_interval
        # The sequence with the least to gain from its suffix draft, and the fewest tokens to catch up on.
        probed = min(range(len(outlooks)), key=lambda i: (outlooks[i].group, outlooks[i].catch_up))
        return DraftPlan((probed,), DraftBudget(min(_PROBE_DEPTH, self._max_depth)))


class _Selection(NamedTuple):
    """Draft tokens that the target verifies."""

    value: float
    """Their expected output tokens, minus the price of their rows."""
    tokens: float
    rows: int


class _Option(NamedTuple):
    """Drafts of the speculator that may be planned."""

    depth: int
    drafting: Sequence[int]
    value: float
    rows: int
    """Draft tokens that the target would verify."""


def _rank(estimates: Sequence[SpeculatorEstimate], depth: int) -> Iterator[list[int]]:
    """Yield the sequences with the likeliest drafts of this depth, then those with the next likeliest as well, .."""
    ranked = sorted(range(len(estimates)), key=lambda i: -sum(estimates[i].reached[:depth]) * estimates[i].exceeded)
    for count, i in enumerate(ranked, start=1):
        if count == len(ranked) or estimates[i] is not estimates[ranked[count]]:
            yield ranked[:count]


class _Throughput:
    """Output tokens per second at pace 1, exponentially weighted towards recent verify steps."""

    def __init__(self, tokens: float, seconds: float) -> None:
        self._tokens, self._seconds = tokens, seconds

    def update(self, tokens: float, seconds: float) -> None:
        self._tokens += _PRICE_RATE * (tokens - self._tokens)
        self._seconds += _PRICE_RATE * (seconds - self._seconds)

    @property
    def rate(self) -> float:
        return self._tokens / self._seconds
