"""Comparisons that a noisy machine cannot fool easily: what is compared runs in turn, close together in time.

A trial runs every arm once on the same prompts; the next one runs them in the opposite order, so that a drift of the
machine favours nobody. A comparison is the median of the trials' own ratios, never the ratio of two averages.

The same ratio over processor time, of this process or of the one that does the work, is reported beside: where other
programs take the cores away, it still tells how much work each arm is. It leaves out what waiting costs, so the figure
itself is always by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Samples:
    """One number a trial."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    def over(self, other: Samples) -> Samples:
        """Trial by trial, this over the other."""
        return Samples(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "median": round(self.median, 4),
            "min": round(min(self.values), 4),
            "max": round(max(self.values), 4),
            "samples": [round(value, 4) for value in self.values],
        }


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should reach."""

    limit: float
    at_least: bool

    def met(self, value: float) -> bool:
        """Whether it does."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report."""

    name: str
    value: float | None
    """None where it could not be measured; ``detail`` says why."""
    unit: str = ""
    goal: Goal | None = None
    samples: Samples | None = None
    detail: Mapping[str, Any] | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        return None if self.goal is None or self.value is None else self.goal.met(self.value)

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "value": None if self.value is None else round(self.value, 4),
            "unit": self.unit,
            "goal": str(self.goal) if self.goal else None,
            "met": self.met,
            **({"ratios": self.samples.summary()} if self.samples else {}),
            **(self.detail or {}),
        }


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second of one arm, by trial."""

    clock: Samples
    processor: Samples
    """Tokens a second of processor time."""

    @property
    def told(self) -> float:
        """For a report."""
        return round(self.clock.median, 2)


def interleaved(
    arms: Mapping[str, Callable[[int], int]],
    trials: int,
    *,
    prepare: Callable[[str], None] = lambda _: None,
    processor: Callable[[], float] = time.process_time,
) -> dict[str, Rates]:
    """Run the arms in turn.

    Args:
        arms: Each is given the number of the trial, and gives the tokens that it answered.
        trials: How often every arm runs.
        prepare: Is given the name of the arm that runs next; its time is nobody's.
        processor: Processor seconds of whatever does the work, so far.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for trial in range(trials):
        order = list(arms)[:: 1 if trial % 2 == 0 else -1]
        for name in order:
            prepare(name)
            clock, used = time.perf_counter(), processor()
            tokens = arms[name](trial)
            found[name].append((tokens / (time.perf_counter() - clock), tokens / max(processor() - used, 1e-6)))
    return {name: Rates(*(Samples(column) for column in zip(*rows, strict=True))) for name, rows in found.items()}


def ratio(
    name: str,
    rates: Mapping[str, Rates],
    over: str,
    under: str,
    *,
    goal: Goal | None = None,
    detail: Mapping[str, Any] = MappingProxyType({}),
) -> Figure:
    """The figure that compares two arms."""
    samples = rates[over].clock.over(rates[under].clock)
    told = {
        "tokens_per_s": {arm: rate.told for arm, rate in rates.items() if arm in (over, under)},
        "by_processor_time": round(rates[over].processor.over(rates[under].processor).median, 4),
        **detail,
    }
    return Figure(name, samples.median, goal=goal, samples=samples, detail=told)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all values do not exceed: the nearest one above, nothing between two."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
