"""How much to draft: what is expected to give the most tokens per second, by what this node has measured.

A verify step drafts a token for every running request, or several, and the target verifies them all in one pass.
Whether
that pays depends on what a pass costs with more rows, on what a drafting step costs, and on how often the target
accepts: all three are measured while the node serves, and the verify step that follows is planned by them.

**Rate.** With B requests, and a_i the share of tokens accepted at depth i of those whose parent was accepted, a draft
of n tokens is expected to give ``B * (1 + a_1 + a_1 a_2 + .. + a_1 .. a_n)`` tokens, and takes
``verify(B (1 + n)) + draft(B, n)`` seconds. The plan's depth is the n with the best rate, none among them. Where drafts
end early or branch, the rows are as many fewer or more as they were in the verify steps before.

**Worth.** Within a verify step a request goes on only as long as it pays. At the best rate, a second is worth so
many tokens;
so a token is drafted while the chance that it will be accepted is worth a drafting step and a row of the target's pass,
and verified while it is worth the row (the threshold policy of SpecDec++, Huang et al., arXiv 2405.19715, with the
threshold taken from the measured costs). The chance is that of its ancestors times what tokens of that draft
probability have proved to be worth.

**Probes.** What is not drafted is not learned of. While nothing is drafted, one request drafts all the same now and
then: rarely while that leads to nothing, at once again after a version was swapped in or a probe was accepted. While
drafts are shorter than they may be, some verify steps draft one token more than planned.

Nothing here does I/O or knows of tensors.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_KNOT_RATE = 0.02
_PACE_RATE = 0.2
_ROWS_RATE = 0.05
_OUTLIER = 3.0

_WINDOW = 48.0
"""Trials that an estimate of acceptance remembers."""
_PROBE_WEIGHT = 8.0
"""Trials that one of a probe counts for: it stands for all the verify steps since the probe before."""
_PRIOR_TRIALS = 2.0
_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

_DEEPER_EVERY = 12
_PROBE_DEPTH = 2
_PROBE_FIRST = 4
_PROBE_LAST = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """What a verify step drafts."""

    depth: int
    """Tokens that a request drafts at most, one after the other; 0 is none."""
    requests: int | None = None
    """How many requests draft, in a probe; None is all of them."""
    step_worth: float = 0.0
    """Expected accepted tokens that pay for drafting one more token and verifying it."""
    row_worth: float = 0.0
    """Expected accepted tokens that pay for verifying a token that is drafted."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the last plan rested on."""

    depth: int
    """Tokens that it drafts a request, one after the other; 0 while drafting does not pay."""
    rates: tuple[float, ...]
    """Output tokens per second that were expected with 0, 1, .. drafted tokens a request."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What the target said of the tokens that were drafted after one that it accepted: siblings, if several."""

    depth: int
    probabilities: tuple[float, ...]
    """That the draft gave each of them."""
    accepted: int | None
    """Which of them the target took, if any."""
    greedy: bool


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that a pass took, without any prompt in it."""

    rows: int
    seconds: float


class Curve:
    """Seconds by number of rows: straight between knots, pulled towards what is seen."""

    def __init__(self, knots: Mapping[int, float]) -> None:
        self._rows = sorted(knots)
        self._seconds = [knots[rows] for rows in self._rows]

    def at(self, rows: int) -> float:
        """Expected seconds."""
        low, share = self._place(rows)
        if len(self._rows) == 1:
            return self._seconds[0]
        return self._seconds[low] * (1 - share) + self._seconds[low + 1] * share

    def learn(self, rows: int, seconds: float, rate: float) -> None:
        """Move the knots beside ``rows`` towards ``seconds``."""
        low, share = self._place(rows)
        error = seconds - self.at(rows)
        share = min(max(share, 0.0), 1.0)
        for knot, weight in ((low, 1 - share), (low + 1, share)):
            if knot < len(self._seconds):
                self._seconds[knot] = max(self._seconds[knot] + rate * weight * error, 1e-9)

    def _place(self, rows: int) -> tuple[int, float]:
        """The knot at or below, and the share of the way to the next one; beyond the ends the line goes on."""
        low = min(max(bisect.bisect_right(self._rows, rows) - 1, 0), max(len(self._rows) - 2, 0))
        if len(self._rows) == 1:
            return 0, 0.0
        return low, (rows - self._rows[low]) / (self._rows[low + 1] - self._rows[low])


class Costs:
    """What the target's pass and the draft's steps take on this machine.

    A machine that turns slower as a whole, because others share it, changes the pace and leaves the curves' form.
    """

    def __init__(self, verify: Curve, first: Curve, further: Curve) -> None:
        self._verify, self._first, self._further = verify, first, further
        self._pace = 1.0

    def verify(self, rows: int) -> float:
        """Seconds of the target's pass over so many rows."""
        return self._pace * self._verify.at(rows)

    def draft(self, requests: int, depth: int) -> float:
        """Seconds to draft ``depth`` tokens for each of so many requests, one after the other."""
        if not depth:
            return 0.0
        return self._pace * (self._first.at(requests) + (depth - 1) * self._further.at(requests))

    def learn(self, verify: Timing, drafts: Sequence[Timing]) -> None:
        """Take in one verify step: the target's pass, and each drafting step in order."""
        self._take(self._verify, verify, sets_pace=True)
        for step, timing in enumerate(drafts):
            self._take(self._further if step else self._first, timing, sets_pace=False)

    def _take(self, curve: Curve, timing: Timing, *, sets_pace: bool) -> None:
        expected = curve.at(timing.rows)
        ratio = min(timing.seconds / (self._pace * expected), _OUTLIER)
        curve.learn(timing.rows, expected * ratio, _KNOT_RATE)
        if sets_pace:
            self._pace *= 1 + _PACE_RATE * (ratio - 1)


class _Share:
    """A share of trials that went well, the recent ones counting most."""

    __slots__ = ("_hits", "_trials")

    def __init__(self) -> None:
        self._hits = self._trials = 0.0

    def learn(self, weight: float, *, hit: bool) -> None:
        keep = (1 - 1 / _WINDOW) ** weight
        gained = (1 - keep) * _WINDOW
        self._trials = self._trials * keep + gained
        self._hits = self._hits * keep + gained * hit

    def given(self, prior: float) -> float:
        """The share, starting from ``prior`` while there were few trials."""
        return (self._hits + prior * _PRIOR_TRIALS) / (self._trials + _PRIOR_TRIALS)


class Acceptance:
    """How often drafted tokens are accepted: by depth, and by the probability that the draft gave them."""

    def __init__(self, longest: int) -> None:
        self._by_depth = [_Share() for _ in range(longest)]
        self._by_probability = [_Share() for _ in range(len(_EDGES) + 1)]

    def learn(self, trial: Trial, weight: float) -> None:
        """Take in what was drafted after an accepted token."""
        depth = min(trial.depth, len(self._by_depth))
        self._by_depth[depth - 1].learn(weight, hit=trial.accepted is not None)
        for i, probability in enumerate(trial.probabilities):
            self._by_probability[bisect.bisect(_EDGES, probability)].learn(weight, hit=i == trial.accepted)

    def by_depth(self) -> list[float]:
        """Chance of acceptance at depth 1, 2, .., given that the parent was accepted.

        A depth that was hardly reached is taken for as good as the one above it, the first one for useless.
        """
        prior, shares = 0.0, []
        for share in self._by_depth:
            prior = share.given(prior)
            shares.append(prior)
        return shares

    def at(self, depth: int) -> float:
        """Chance at this depth of a token of which no more is known, given that its parent was accepted."""
        return self.by_depth()[min(depth, len(self._by_depth)) - 1]

    def of(self, probability: float) -> float:
        """Chance of acceptance of a token with this draft probability, given that its parent was accepted."""
        return self._by_probability[bisect.bisect(_EDGES, probability)].given(probability)


class Utility:
    """Plans verify steps by what was measured.

    Args:
        costs: Curves of this machine, calibrated at start.
        longest: Tokens that are drafted at most.
        adaptive: False drafts ``longest`` tokens in every verify step.
    """

    def __init__(self, costs: Costs, longest: int, *, adaptive: bool = True) -> None:
        self._costs, self._longest, self._adaptive = costs, longest, adaptive
        self.acceptance: Mapping[bool, Acceptance] = {greedy: Acceptance(longest) for greedy in (True, False)}
        """Of greedy requests (True) and of sampled ones (False)."""
        self._until_probe = self._pause = _PROBE_FIRST
        self._until_deeper = _DEEPER_EVERY
        self._known_depth = longest
        """Tokens of the present verify step's drafts that are more than a probe."""
        self._rows_per_depth = 1.0
        """Verified tokens of a request for each step of its draft; above one in trees."""
        self.forecast = Forecast(0 if adaptive else longest, ())

    def plan(self, greedy: Sequence[bool]) -> Plan:
        """The coming verify step, for one request for each entry: whether it decodes greedily."""
        if not self._adaptive:
            return Plan(self._longest)
        if not greedy:
            return Plan(0)
        rates = self.rates(greedy)
        depth = max(range(len(rates)), key=rates.__getitem__)
        self._known_depth = depth
        self.forecast = Forecast(depth, tuple(rates))
        if depth:
            self._until_probe = self._pause = _PROBE_FIRST
            return self._speculating(len(greedy), depth, rates[depth])
        self._until_probe -= 1
        if self._until_probe > 0:
            return Plan(0)
        self._pause = min(2 * self._pause, _PROBE_LAST)
        self._until_probe = self._pause
        return Plan(min(_PROBE_DEPTH, self._longest), requests=1)

    def rates(self, greedy: Sequence[bool]) -> list[float]:
        """Expected tokens per second with 0, 1, .. drafted tokens a request."""
        requests = len(greedy)
        share = sum(greedy) / requests
        chances = zip(self.acceptance[True].by_depth(), self.acceptance[False].by_depth(), strict=True)
        reached = itertools.accumulate((share * a + (1 - share) * b for a, b in chances), lambda x, y: x * y)
        tokens = itertools.accumulate(reached, initial=1.0)
        return [requests * expected / self._seconds(requests, depth) for depth, expected in enumerate(tokens)]

    def rows_within(self, seconds: float, *, beside: int, most: int) -> int:
        """Rows by which a pass over ``beside`` of them becomes longer by no more than ``seconds``; one at least."""
        without = self._costs.verify(beside)
        longer = bisect.bisect_right(
            range(1, most + 1), seconds, key=lambda rows: self._costs.verify(beside + rows) - without
        )
        return max(longer, 1)

    def observe(self, trials: Iterable[Trial], verify: Timing | None, drafts: Sequence[Timing], drafted: int) -> None:
        """Take in what a verify step showed.

        Args:
            trials: What the target said of the drafts.
            verify: The target's pass; None where it also read prompts.
            drafts: The drafting steps in order.
            drafted: Tokens that were verified.
        """
        steps = sum(timing.rows for timing in drafts)
        if steps:
            self._rows_per_depth += _ROWS_RATE * (drafted / steps - self._rows_per_depth)
        for trial in trials:
            probed = trial.depth > self._known_depth
            self.acceptance[trial.greedy].learn(trial, _PROBE_WEIGHT if probed else 1.0)
            if probed and trial.accepted is not None:
                self._until_probe = self._pause = _PROBE_FIRST
        if verify is not None:
            # A probe's first step also follows all that was committed since the last one; that is no verify step's
            # price.
            self._costs.learn(verify, drafts if self._known_depth else ())

    def renew(self) -> None:
        """A version was swapped in: look at it soon."""
        self._until_probe = self._pause = 1

    def _speculating(self, requests: int, depth: int, rate: float) -> Plan:
        self._until_deeper -= 1
        if self._until_deeper <= 0 and depth < self._longest:
            self._until_deeper = _DEEPER_EVERY
            return Plan(depth + 1)
        costs = self._costs
        rows = self._rows(requests, depth)
        row = (costs.verify(rows) - costs.verify(requests)) / max(rows - requests, 1)
        step = (costs.draft(requests, depth + 1) - costs.draft(requests, depth)) / requests
        return Plan(depth, step_worth=rate * max(step + row, 0.0), row_worth=rate * max(row, 0.0))

    def _seconds(self, requests: int, depth: int) -> float:
        return self._costs.verify(self._rows(requests, depth)) + self._costs.draft(requests, depth)

    def _rows(self, requests: int, depth: int) -> int:
        """Rows of the target's pass: the roots, and what is expected to be verified."""
        return requests + round(requests * depth * self._rows_per_depth)
