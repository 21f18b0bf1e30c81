"""How much to draft, and with which drafter: the drafts with the highest expected throughput on this node.

In a verify step every sequence drafts zero or more tokens, and the target verifies all of them in one forward. Whether
drafting pays depends on the latency of a forward with more rows, on the latency of the speculator's draft steps, and on
how often the target accepts. The planner measures all three while the node serves, and plans the next verify step with
them. A *row* is one token of a forward.

**Price.** A verify step that takes a second longer costs the tokens that the node puts out in a second. The planner
averages this throughput over recent verify steps, for each number of decoding sequences. A draft token is worth a row,
and a draft step is worth its time, if the expected tokens exceed the price. Measuring latency in units of this
machine's pace keeps prices valid while other processes slow the machine down as a whole.

**Acceptance.** The acceptance probability of a draft token is that of its parent times the acceptance rate measured for
similar tokens: of the speculator, by draft probability; of the suffix drafter, by estimated probability and by the
length of the match. Greedy and sampled sequences have rates of their own. A swap discards those of the version before.

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

This module does no I/O and needs no torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.trace.record import DraftSource

F64 = npt.NDArray[np.float64]

_KNOT_RATE = 0.02
_PACE_RATE = 0.2
_STEPS_RATE = 0.05
_PRICE_RATE = 0.03
_MAX_RATIO = 3.0
"""A measured latency counts at most as this multiple of the expected one: outliers say little."""

_WINDOW = 48.0
"""Outcomes that an acceptance rate remembers."""
_PROBE_WEIGHT = 8.0
"""Outcomes that one outcome of a probe counts as: it stands for all verify steps since the probe before."""
_PRIOR_WEIGHT = 2.0
"""Outcomes that the prior of an acceptance rate counts as."""
_PROBABILITY_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_MATCH_EDGES = (1, 3, 4, 6, 9, 16)
"""First match length of each group but the first, which is that of the speculator's tokens."""
_CONFIDENCE_EDGES = (0.05, 0.3, 0.5, 0.7, 0.85)
"""Edges of the acceptance probability of a suffix draft's first token, between which the speculator's gain differs."""

_EXPLORED_LOSS = 0.02
"""Share of the output that the speculator's drafts may be expected to cost: so little is within the noise of the
estimates, and only drafts correct them."""
_DEEPER_INTERVAL = 12
_PROBE_DEPTH = 2
_MIN_PROBE_INTERVAL = 4
_MAX_PROBE_INTERVAL = 32
"""Verify steps between probes; the interval doubles from the minimum to the maximum."""


@dataclass(frozen=True, slots=True)
class DraftBudget:
    """How much the speculator may draft for its sequences in one verify step."""

    depth: int
    """Maximum depth of a draft tree; 0 drafts nothing."""
    draft_threshold: float = 0.0
    """Minimum acceptance probability of a token for which drafting and verifying it pays."""
    verify_threshold: float = 0.0
    """Minimum acceptance probability of a draft token for which verifying it pays."""


class DraftPlan(NamedTuple):
    """Which of the sequences the speculator drafts for, and how much."""

    drafting: Sequence[int]
    """Indices of the sequences."""
    budget: DraftBudget


class SequenceOutlook(NamedTuple):
    """What the planner knows of a sequence before the speculator drafts."""

    greedy: bool
    chances: Sequence[float] = ()
    """Acceptance probability of each token of the suffix draft, in descending order."""
    catch_up: int = 0
    """Committed tokens that the speculator has not read."""

    @property
    def confidence(self) -> float:
        """Acceptance probability of the likeliest token of the suffix draft."""
        return self.chances[0] if self.chances else 0.0


@dataclass(frozen=True, slots=True)
class DraftOutcome:
    """Which of the sibling tokens that one drafter proposed after an accepted token is the output, if any."""

    source: DraftSource
    greedy: bool
    siblings: tuple[tuple[float, int], ...]
    """Draft probability and match length of each sibling."""
    accepted: int | None
    """Index of the sibling that is the output; None if it is another token."""


class SpeculatorOutcome(NamedTuple):
    """How far the two drafts of one sequence were accepted."""

    greedy: bool
    confidence: float
    """Of the suffix draft (``SequenceOutlook.confidence``)."""
    suffix_tokens: int
    """Tokens that the suffix draft alone would have had accepted."""
    speculator_tokens: int
    """Tokens that the speculator's draft alone would have had accepted."""
    drafted_depth: int
    """Depth to which the speculator could draft."""


class SpeculatorEstimate(NamedTuple):
    """What is expected of the speculator's draft for one sequence."""

    reached: Sequence[float]
    """Probability that the first 1, 2, .. tokens are accepted."""
    exceeded: float
    """Probability that an accepted token of the suffix draft lies deeper than all accepted tokens of this draft."""


class ForwardTiming(NamedTuple):
    """Duration of one forward that read no prompt."""

    sequences: int
    rows: int
    seconds: float


class LatencyCurve:
    """Seconds by number of rows: linear between knots, which move towards the measurements."""

    def __init__(self, knots: Mapping[int, float]) -> None:
        self._rows = sorted(knots)
        self._seconds = [knots[rows] for rows in self._rows]

    def predict(self, rows: int) -> float:
        """Return the expected seconds."""
        low, share = self._locate(rows)
        return self._seconds[low] * (1 - share) + self._seconds[min(low + 1, len(self._rows) - 1)] * share

    def predict_range(self, first: int, count: int) -> F64:
        """Return [count] the expected seconds of ``first``, ``first`` + 1, .. rows."""
        rows = np.arange(first, first + count)
        seconds: F64 = np.interp(rows, self._rows, self._seconds)
        outside = (rows < self._rows[0]) | (rows > self._rows[-1])
        seconds[outside] = [self.predict(int(row)) for row in rows[outside]]
        return seconds

    def update(self, rows: int, error: float) -> None:
        """Move the knots next to ``rows`` by a share of ``error`` each."""
        low, share = self._locate(rows)
        share = min(max(share, 0.0), 1.0)
        for knot, weight in ((low, 1 - share), (low + 1, share)):
            if knot < len(self._seconds):
                self._seconds[knot] = max(self._seconds[knot] + weight * error, 1e-9)

    def _locate(self, rows: int) -> tuple[int, float]:
        """Return the knot at or below ``rows`` and the share of the way to the next; extrapolate beyond the ends."""
        if len(self._rows) == 1:
            return 0, 0.0
        low = min(max(bisect.bisect_right(self._rows, rows) - 1, 0), len(self._rows) - 2)
        return low, (rows - self._rows[low]) / (self._rows[low + 1] - self._rows[low])


class LatencyModel:
    """Latency of the target's forward and of the speculator's draft steps on this machine.

    Args:
        rows: Seconds of a forward over rows of one sequence.
        sequences: Seconds that a forward over as many sequences takes longer than over one with the same rows.
        first_step: Seconds of the first draft step by number of sequences.
        further_step: Seconds of each later draft step.
    """

    def __init__(
        self, rows: LatencyCurve, sequences: LatencyCurve, first_step: LatencyCurve, further_step: LatencyCurve
    ) -> None:
        self._rows, self._sequences, self._first_step, self._further_step = rows, sequences, first_step, further_step
        self.pace = 1.0
        """Measured seconds per predicted second. If other processes slow the machine down as a whole, it follows
        quickly, and the curves keep their form."""

    def predict_verify(self, sequences: int, rows: int) -> float:
        """Return the seconds of the target's forward, at pace 1."""
        return self._rows.predict(rows) + self._sequences.predict(sequences)

    def predict_rows(self, sequences: int, count: int) -> F64:
        """Return [count] the seconds of the target's forward over one row per sequence and 0, 1, .. more, at pace 1."""
        return self._rows.predict_range(sequences, count) + self._sequences.predict(sequences)

    def predict_draft(self, sequences: int, depth: int) -> float:
        """Return the seconds to draft ``depth`` tokens, one after the other, for each sequence, at pace 1."""
        if not depth or not sequences:
            return 0.0
        return self.predict_step(sequences, 0) + (depth - 1) * self.predict_step(sequences, 1)

    def predict_step(self, sequences: int, step: int) -> float:
        """Return the seconds of one draft step, numbered from 0, at pace 1."""
        return (self._further_step if step else self._first_step).predict(sequences)

    def update_verify(self, timing: ForwardTiming) -> None:
        """Learn from the target's forward."""
        expected = self.predict_verify(timing.sequences, timing.rows)
        ratio = self._compare(timing.seconds, expected)
        error = _KNOT_RATE * expected * (ratio - 1)
        self._rows.update(timing.rows, error)
        self._sequences.update(timing.sequences, error if timing.sequences > 1 else 0.0)
        self.pace *= 1 + _PACE_RATE * (ratio - 1)

    def update_draft(self, steps: Sequence[ForwardTiming]) -> None:
        """Learn from the draft steps in order."""
        for i, timing in enumerate(steps):
            curve = self._further_step if i else self._first_step
            expected = curve.predict(timing.sequences)
            curve.update(timing.sequences, _KNOT_RATE * expected * (self._compare(timing.seconds, expected) - 1))

    def _compare(self, seconds: float, expected: float) -> float:
        return min(seconds / (self.pace * expected), _MAX_RATIO)


class _AcceptanceRate:
    """The share of accepted tokens, exponentially weighted towards recent ones."""

    __slots__ = ("_accepted", "_total")

    def __init__(self) -> None:
        self._accepted = self._total = 0.0

    def update(self, *, accepted: bool, weight: float = 1.0) -> None:
        keep = (1 - 1 / _WINDOW) ** weight
        gained = (1 - keep) * _WINDOW
        self._total = self._total * keep + gained
        self._accepted = self._accepted * keep + gained * accepted

    def estimate(self, prior: float) -> float:
        """Return the rate; with few outcomes it stays near ``prior``."""
        return (self._accepted + prior * _PRIOR_WEIGHT) / (self._total + _PRIOR_WEIGHT)


class AcceptanceModel:
    """Acceptance rate of one drafter's tokens whose parent was accepted, by draft probability and match length."""

    def __init__(self) -> None:
        self._rates = [
            [_AcceptanceRate() for _ in range(len(_PROBABILITY_EDGES) + 1)] for _ in range(len(_MATCH_EDGES) + 1)
        ]
        self._next = _AcceptanceRate()

    def update(self, outcome: DraftOutcome, weight: float = 1.0) -> None:
        """Learn from the outcome of sibling tokens."""
        self._next.update(accepted=outcome.accepted is not None, weight=weight)
        for i, (probability, match_length) in enumerate(outcome.siblings):
            self._find_rate(probability, match_length).update(accepted=i == outcome.accepted, weight=weight)

    def estimate(self, probability: float, match_length: int = 0) -> float:
        """Return the acceptance rate of similar tokens. The draft probability is also the prior."""
        return self._find_rate(probability, match_length).estimate(probability)

    def estimate_next(self) -> float:
        """Return the rate at which one of the tokens drafted after an accepted token is accepted."""
        return self._next.estimate(1.0)

    def _find_rate(self, probability: float, match_length: int) -> _AcceptanceRate:
        return self._rates[bisect.bisect(_MATCH_EDGES, match_length)][bisect.bisect(_PROBABILITY_EDGES, probability)]


class SpeculatorModel:
    """Acceptance of the speculator's drafts by depth, next to suffix drafts of similar confidence."""

    def __init__(self, max_depth: int) -> None:
        groups = range(len(_CONFIDENCE_EDGES) + 1)
        self._reached = [[_AcceptanceRate() for _ in range(max_depth)] for _ in groups]
        self._exceeded = [_AcceptanceRate() for _ in groups]

    def update(self, outcome: SpeculatorOutcome, weight: float) -> None:
        """Learn from one draft."""
        group = _group(outcome.confidence)
        for depth, rate in enumerate(self._reached[group][: outcome.drafted_depth], start=1):
            rate.update(accepted=depth <= outcome.speculator_tokens, weight=weight)
        if outcome.suffix_tokens:
            self._exceeded[group].update(accepted=outcome.suffix_tokens > outcome.speculator_tokens, weight=weight)

    def estimate(self, confidence: float) -> SpeculatorEstimate:
        """Return what is expected of a draft next to a suffix draft of this confidence.

        Without a suffix draft, depths that are not measured are as if every depth had the rate of the first, and the
        first is 0. The prior next to a suffix draft is the rate without one.
        """
        group, reached = _group(confidence), list[float]()
        for alone, rate in zip(self._reached[0], self._reached[group], strict=True):
            above, first = (reached[-1], reached[0]) if reached else (1.0, 0.0)
            prior = alone.estimate(above * first)
            reached.append(min(rate.estimate(prior) if group else prior, above))
        return SpeculatorEstimate(reached, self._exceeded[group].estimate(1 - reached[0]))


class Planner:
    """Plans verify steps from measurements.

    Args:
        latency: Latency model of this machine, calibrated at start.
        max_depth: Maximum depth of the speculator's draft trees.
        adaptive: Whether to adapt the drafts; False drafts to ``max_depth`` and verifies all in every verify step.
    """

    def __init__(self, latency: LatencyModel, max_depth: int, *, adaptive: bool = True) -> None:
        self._latency, self._max_depth, self._adaptive = latency, max_depth, adaptive
        self.suffix: Mapping[bool, AcceptanceModel] = {greedy: AcceptanceModel() for greedy in (True, False)}
        """Acceptance of the suffix drafter's tokens in greedy sequences (True) and in sampled ones (False)."""
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
        if not self._adaptive or not outlooks:
            return DraftPlan(range(len(outlooks)), DraftBudget(self._max_depth if outlooks else 0))
        suffixes = [np.asarray(outlook.chances, np.float64) for outlook in outlooks]
        estimates = self._estimate_drafts(outlooks)
        row_prices = self._price_rows(decoding, 1 + sum(map(len, suffixes)) + len(outlooks) * self._max_depth)
        without = self._evaluate(np.concatenate(suffixes), [], row_prices)
        price, plain = self._price(decoding), self._latency.predict_verify(decoding, decoding)
        best = _Option(0, (), without.value - _EXPLORED_LOSS * (decoding + without.tokens), without.rows)
        throughput = [decoding / plain]
        for depth in range(1, self._max_depth + 1):
            rate = 0.0
            for drafting in _rank(estimates, depth):
                free, forced = list(suffixes), list[float]()
                for i in drafting:
                    reached = estimates[i].reached[:depth]
                    free[i] = suffixes[i] * estimates[i].exceeded
                    if outlooks[i].greedy:
                        free.append(np.asarray(reached))
                    else:
                        forced += reached
                verified = self._evaluate(np.concatenate(free), forced, row_prices)
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

    def select(self, decoding: int, sampled: int, chances: Sequence[float]) -> int:
        """Return how many of the candidates the target verifies.

        Args:
            decoding: Number of decoding sequences.
            sampled: Number of draft tokens that the target verifies in any case.
            chances: Acceptance probability of each candidate, in descending order.
        """
        if not self._adaptive:
            return len(chances)
        row_prices = self._price_rows(decoding, 1 + sampled + len(chances))
        return self._evaluate(np.asarray(chances, np.float64), [0.0] * sampled, row_prices).rows - sampled

    def limit_prompt_rows(self, seconds: float, *, decode_rows: int, max_rows: int) -> int:
        """Return how many prompt rows extend a forward over ``decode_rows`` by ``seconds`` at most; at least 1."""
        without = self._latency.predict_verify(1, decode_rows)
        rows = bisect.bisect_right(
            range(1, max_rows + 1),
            seconds / self._latency.pace,
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
        if self.depth:
            # A probe's first draft step also consumes all tokens committed since the last one, which is not its price.
            latency.update_draft(draft_steps)

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

    def _evaluate(self, free: F64, forced: Sequence[float], row_prices: F64) -> _Selection:
        """Return the selection of draft tokens with the highest value.

        Args:
            free: Expected output tokens of each draft token that need not be verified.
            forced: Those of each that is verified in any case.
            row_prices: Price of 0, 1, .. draft tokens.
        """
        ranked = np.concatenate(([0.0], forced, np.sort(free)[::-1]))
        tokens = ranked.cumsum()[len(forced) :]
        values = tokens - row_prices[len(forced) : len(ranked)]
        best = int(values.argmax())
        return _Selection(float(values[best]), float(tokens[best]), len(forced) + best)

    def _estimate_drafts(self, outlooks: Sequence[SequenceOutlook]) -> list[SpeculatorEstimate]:
        """Return what is expected of the speculator's draft for each sequence; one object for similar sequences."""
        kinds = [(outlook.greedy, _group(outlook.confidence)) for outlook in outlooks]
        estimates = {
            kind: self._drafts[outlook.greedy].estimate(outlook.confidence)
            for kind, outlook in dict(zip(kinds, outlooks, strict=True)).items()
        }
        return [estimates[kind] for kind in kinds]

    def _limit_speculator(self, drafting: int, price: float, row_prices: F64, rows: int) -> DraftBudget:
        """Return the budget of the planned depth, or now and then of one token more."""
        self._until_deeper -= 1
        if self._until_deeper <= 0 and self.depth < self._max_depth:
            self._until_deeper = _DEEPER_INTERVAL
            return DraftBudget(self.depth + 1)
        first = max(rows - drafting, 0)
        row = float(row_prices[rows] - row_prices[first]) / max(rows - first, 1)
        step = price * self._latency.predict_step(drafting, 1) / drafting
        return DraftBudget(self.depth, max(step + row, 0.0), max(row, 0.0))

    def _plan_probe(self, outlooks: Sequence[SequenceOutlook]) -> DraftPlan:
        self._until_probe -= 1
        if self._until_probe > 0:
            return DraftPlan((), DraftBudget(0))
        self._probe_interval = min(2 * max(self._probe_interval, _MIN_PROBE_INTERVAL // 2), _MAX_PROBE_INTERVAL)
        self._until_probe = self._probe_interval
        # The sequence with the least to gain from its suffix draft, and the fewest tokens to catch up on.
        probed = min(range(len(outlooks)), key=lambda i: (_group(outlooks[i].confidence), outlooks[i].catch_up))
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


def _group(confidence: float) -> int:
    """Return the group of suffix drafts with a similar confidence; 0 is that without a draft."""
    return bisect.bisect(_CONFIDENCE_EDGES, confidence)
