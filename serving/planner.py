"""How much to draft: the budget with the highest expected throughput, by latency and acceptance on this node.

In a verify step every sequence drafts zero or more tokens, and the target verifies all of them in one forward. Whether
drafting pays depends on the latency of a forward with more rows, on the latency of a draft step, and on how often the
target accepts. The planner measures all three while the node serves, and plans the next verify step with them. A *row*
is one token of a forward.

**Throughput.** With B sequences, and a_i the acceptance rate at depth i of tokens whose parent was accepted, drafts of
n tokens yield an expected ``B * (1 + a_1 + a_1 a_2 + .. + a_1 .. a_n)`` tokens in ``verify(B (1 + n)) + draft(B, n)``
seconds. The planned depth is the n, possibly 0, with the highest throughput. Drafts that end early or branch have fewer
or more rows, so the number of rows is scaled by the ratio that recent verify steps had.

**Thresholds.** Within a verify step a draft grows only while that pays. The highest throughput gives the price of a
second in tokens. A sequence drafts another token while its acceptance probability exceeds the price of a draft step and
a row, and verifies a draft token while that probability exceeds the price of a row (the threshold policy of SpecDec++,
Huang et al., arXiv 2405.19715, with thresholds from measured latency). The acceptance probability is that of the
token's parent times the acceptance rate measured for tokens with a similar draft probability.

**Probes.** Acceptance is measured only on tokens that are drafted. While drafting does not pay, one sequence drafts
every now and then as a probe: rarely while probes are rejected, soon after a swap or an accepted probe. While drafts
are shorter than the limit, every twelfth verify step drafts one token more than planned.

This module does no I/O and needs no torch.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_KNOT_RATE = 0.02
_PACE_RATE = 0.2
_ROWS_RATE = 0.05
_MAX_RATIO = 3.0
"""A measured latency counts at most as this multiple of the expected one: outliers say little."""

_WINDOW = 48.0
"""Outcomes that an acceptance rate remembers."""
_PROBE_WEIGHT = 8.0
"""Outcomes that one outcome of a probe counts as: it stands for all verify steps since the probe before."""
_PRIOR_WEIGHT = 2.0
"""Outcomes that the prior of an acceptance rate counts as."""
_PROBABILITY_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

_DEEPER_INTERVAL = 12
_PROBE_DEPTH = 2
_MIN_PROBE_INTERVAL = 4
_MAX_PROBE_INTERVAL = 32
"""Verify steps between probes; the interval doubles from the minimum to the maximum."""


@dataclass(frozen=True, slots=True)
class DraftBudget:
    """How much the sequences may draft in one verify step."""

    depth: int
    """Maximum depth of a draft tree; 0 drafts nothing."""
    max_sequences: int | None = None
    """Maximum number of sequences that draft: set in a probe, else None."""
    draft_threshold: float = 0.0
    """Minimum acceptance probability of a token for which drafting and verifying it pays."""
    verify_threshold: float = 0.0
    """Minimum acceptance probability of a draft token for which verifying it pays."""
    acceptance: Mapping[bool, AcceptanceModel] = field(default_factory=dict, compare=False, repr=False)
    """Measured acceptance of greedy sequences (True) and of sampled ones (False)."""


@dataclass(frozen=True, slots=True)
class DraftOutcome:
    """Whether the target accepted one of the sibling tokens that were drafted after an accepted token."""

    depth: int
    probabilities: tuple[float, ...]
    """Draft probability of each sibling."""
    accepted: int | None
    """Index of the accepted sibling; None if the target rejected all."""
    greedy: bool


@dataclass(frozen=True, slots=True)
class ForwardTiming:
    """Duration of one forward that read no prompt."""

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

    def update(self, rows: int, seconds: float, rate: float) -> None:
        """Move the knots next to ``rows`` towards ``seconds``."""
        low, share = self._locate(rows)
        error = seconds - self.predict(rows)
        share = min(max(share, 0.0), 1.0)
        for knot, weight in ((low, 1 - share), (low + 1, share)):
            if knot < len(self._seconds):
                self._seconds[knot] = max(self._seconds[knot] + rate * weight * error, 1e-9)

    def _locate(self, rows: int) -> tuple[int, float]:
        """Return the knot at or below ``rows`` and the share of the way to the next; extrapolate beyond the ends."""
        if len(self._rows) == 1:
            return 0, 0.0
        low = min(max(bisect.bisect_right(self._rows, rows) - 1, 0), len(self._rows) - 2)
        return low, (rows - self._rows[low]) / (self._rows[low + 1] - self._rows[low])


class LatencyModel:
    """Latency of the target's forward and of the draft's steps on this machine.

    If other processes slow the machine down as a whole, the pace follows quickly and the curves keep their form.
    """

    def __init__(self, verify: LatencyCurve, first_step: LatencyCurve, further_step: LatencyCurve) -> None:
        self._verify, self._first_step, self._further_step = verify, first_step, further_step
        self._pace = 1.0

    def predict_verify(self, rows: int) -> float:
        """Return the seconds of the target's forward over ``rows`` rows."""
        return self._pace * self._verify.predict(rows)

    def predict_draft(self, sequences: int, depth: int) -> float:
        """Return the seconds to draft ``depth`` tokens, one after the other, for each sequence."""
        if not depth:
            return 0.0
        further = (depth - 1) * self._further_step.predict(sequences)
        return self._pace * (self._first_step.predict(sequences) + further)

    def update(self, verify: ForwardTiming, draft_steps: Sequence[ForwardTiming]) -> None:
        """Learn from one verify step: the target's forward, and each draft step in order."""
        self._update_curve(self._verify, verify, sets_pace=True)
        for step, timing in enumerate(draft_steps):
            self._update_curve(self._further_step if step else self._first_step, timing, sets_pace=False)

    def _update_curve(self, curve: LatencyCurve, timing: ForwardTiming, *, sets_pace: bool) -> None:
        expected = curve.predict(timing.rows)
        ratio = min(timing.seconds / (self._pace * expected), _MAX_RATIO)
        curve.update(timing.rows, expected * ratio, _KNOT_RATE)
        if sets_pace:
            self._pace *= 1 + _PACE_RATE * (ratio - 1)


class _AcceptanceRate:
    """The share of accepted tokens, exponentially weighted towards recent ones."""

    __slots__ = ("_accepted", "_total")

    def __init__(self) -> None:
        self._accepted = self._total = 0.0

    def update(self, weight: float, *, accepted: bool) -> None:
        keep = (1 - 1 / _WINDOW) ** weight
        gained = (1 - keep) * _WINDOW
        self._total = self._total * keep + gained
        self._accepted = self._accepted * keep + gained * accepted

    def estimate(self, prior: float) -> float:
        """Return the rate; with few outcomes it stays near ``prior``."""
        return (self._accepted + prior * _PRIOR_WEIGHT) / (self._total + _PRIOR_WEIGHT)


class AcceptanceModel:
    """Acceptance rate of draft tokens whose parent was accepted, by depth and by draft probability."""

    def __init__(self, max_depth: int) -> None:
        self._by_depth = [_AcceptanceRate() for _ in range(max_depth)]
        self._by_probability = [_AcceptanceRate() for _ in range(len(_PROBABILITY_EDGES) + 1)]

    def update(self, outcome: DraftOutcome, weight: float) -> None:
        """Learn from the outcome of sibling tokens."""
        depth = min(outcome.depth, len(self._by_depth))
        self._by_depth[depth - 1].update(weight, accepted=outcome.accepted is not None)
        for i, probability in enumerate(outcome.probabilities):
            bucket = self._by_probability[bisect.bisect(_PROBABILITY_EDGES, probability)]
            bucket.update(weight, accepted=i == outcome.accepted)

    def estimate_by_depth(self) -> list[float]:
        """Return the acceptance rate at depth 1, 2, ..

        The prior of a depth is the rate of the depth above; that of depth 1 is 0.
        """
        prior, rates = 0.0, []
        for rate in self._by_depth:
            prior = rate.estimate(prior)
            rates.append(prior)
        return rates

    def estimate_at_depth(self, depth: int) -> float:
        """Return the acceptance rate at one depth."""
        return self.estimate_by_depth()[min(depth, len(self._by_depth)) - 1]

    def estimate_for(self, probability: float) -> float:
        """Return the acceptance rate of tokens with this draft probability, which is also the prior."""
        return self._by_probability[bisect.bisect(_PROBABILITY_EDGES, probability)].estimate(probability)


class Planner:
    """Plans verify steps from measurements.

    Args:
        latency: Latency model of this machine, calibrated at start.
        max_depth: Maximum depth of a draft tree.
        adaptive: Whether to adapt the depth; False drafts to ``max_depth`` in every verify step.
    """

    def __init__(self, latency: LatencyModel, max_depth: int, *, adaptive: bool = True) -> None:
        self._latency, self._max_depth, self._adaptive = latency, max_depth, adaptive
        self.acceptance: Mapping[bool, AcceptanceModel] = {
            greedy: AcceptanceModel(max_depth) for greedy in (True, False)
        }
        """Of greedy sequences (True) and of sampled ones (False)."""
        self._until_probe = self._probe_interval = _MIN_PROBE_INTERVAL
        self._until_deeper = _DEEPER_INTERVAL
        self._rows_per_depth = 1.0
        """Verified tokens per sequence and draft step; above 1 for trees."""
        self.depth = 0 if adaptive else max_depth
        """Depth of the last plan, 0 while drafting does not pay; deeper draft tokens are a probe."""
        self.throughput: tuple[float, ...] = ()
        """The reason for it: expected tokens per second with 0, 1, .. draft tokens per sequence."""

    def plan(self, greedy: Sequence[bool]) -> DraftBudget:
        """Return the budget of the next verify step.

        Args:
            greedy: For each sequence that may draft, whether it decodes greedily.
        """
        if not self._adaptive:
            return DraftBudget(self._max_depth, acceptance=self.acceptance)
        if not greedy:
            return DraftBudget(0)
        self.throughput = self.estimate_throughput(greedy)
        self.depth = max(range(len(self.throughput)), key=self.throughput.__getitem__)
        if self.depth:
            self._until_probe = self._probe_interval = _MIN_PROBE_INTERVAL
            return self._plan_depth(len(greedy), self.depth, self.throughput[self.depth])
        self._until_probe -= 1
        if self._until_probe > 0:
            return DraftBudget(0)
        self._probe_interval = min(2 * self._probe_interval, _MAX_PROBE_INTERVAL)
        self._until_probe = self._probe_interval
        return DraftBudget(min(_PROBE_DEPTH, self._max_depth), max_sequences=1, acceptance=self.acceptance)

    def estimate_throughput(self, greedy: Sequence[bool]) -> tuple[float, ...]:
        """Return the expected tokens per second with 0, 1, .. draft tokens per sequence."""
        sequences = len(greedy)
        share = sum(greedy) / sequences
        by_depth = (self.acceptance[kind].estimate_by_depth() for kind in (True, False))
        rates = (share * g + (1 - share) * s for g, s in zip(*by_depth, strict=True))
        reached = itertools.accumulate(rates, lambda x, y: x * y)
        tokens = itertools.accumulate(reached, initial=1.0)
        seconds = (
            self._latency.predict_verify(self._count_rows(sequences, depth))
            + self._latency.predict_draft(sequences, depth)
            for depth in range(self._max_depth + 1)
        )
        return tuple(sequences * total / step for total, step in zip(tokens, seconds, strict=True))

    def limit_prompt_rows(self, seconds: float, *, decode_rows: int, max_rows: int) -> int:
        """Return how many prompt rows extend a forward over ``decode_rows`` by ``seconds`` at most; at least 1."""
        decode_seconds = self._latency.predict_verify(decode_rows)
        rows = bisect.bisect_right(
            range(1, max_rows + 1),
            seconds,
            key=lambda rows: self._latency.predict_verify(decode_rows + rows) - decode_seconds,
        )
        return max(rows, 1)

    def observe(
        self,
        outcomes: Iterable[DraftOutcome],
        verify: ForwardTiming | None,
        draft_steps: Sequence[ForwardTiming],
        verified_tokens: int,
    ) -> None:
        """Learn from one verify step.

        Args:
            outcomes: Outcomes of the drafts.
            verify: The target's forward; None if it also read prompts.
            draft_steps: The draft steps in order.
            verified_tokens: Number of draft tokens that the target verified.
        """
        step_rows = sum(timing.rows for timing in draft_steps)
        if step_rows:
            self._rows_per_depth += _ROWS_RATE * (verified_tokens / step_rows - self._rows_per_depth)
        for outcome in outcomes:
            is_probe = outcome.depth > self.depth
            self.acceptance[outcome.greedy].update(outcome, _PROBE_WEIGHT if is_probe else 1.0)
            if is_probe and outcome.accepted is not None:
                self._until_probe = self._probe_interval = _MIN_PROBE_INTERVAL
        if verify is not None:
            # A probe's first draft step also consumes all tokens committed since the last one, which is not its price.
            self._latency.update(verify, draft_steps if self.depth else ())

    def request_probe(self) -> None:
        """Probe in the next verify step, because a version was swapped in."""
        self._until_probe = self._probe_interval = 1

    def _plan_depth(self, sequences: int, depth: int, throughput: float) -> DraftBudget:
        self._until_deeper -= 1
        if self._until_deeper <= 0 and depth < self._max_depth:
            self._until_deeper = _DEEPER_INTERVAL
            return DraftBudget(depth + 1, acceptance=self.acceptance)
        latency = self._latency
        rows = self._count_rows(sequences, depth)
        row_seconds = (latency.predict_verify(rows) - latency.predict_verify(sequences)) / max(rows - sequences, 1)
        step_seconds = (
            latency.predict_draft(sequences, depth + 1) - latency.predict_draft(sequences, depth)
        ) / sequences
        return DraftBudget(
            depth,
            draft_threshold=throughput * max(step_seconds + row_seconds, 0.0),
            verify_threshold=throughput * max(row_seconds, 0.0),
            acceptance=self.acceptance,
        )

    def _count_rows(self, sequences: int, depth: int) -> int:
        """Return the expected rows of the target's forward: one root per sequence, and the draft tokens."""
        return sequences + round(sequences * depth * self._rows_per_depth)
