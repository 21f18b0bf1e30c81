"""The harness of all benchmarks: the machine, alternating trials, paired ratios, goals, and the report.

A trial runs every arm once on the same prompts. The next trial runs the arms in the opposite order, so that a drift of
the machine favors none of them. A comparison is the median of the trials' own ratios, never the ratio of two averages.

The same ratio over processor time, of this process or of the one that does the work, stands beside it: where other
programs take the cores away, it still shows how much work each arm is. Processor time omits waiting, so the figure
itself always uses the clock.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from schemas.build_info import code_revision
from schemas.errors import UserError

Say = Callable[[str], None]
Selection = Callable[[str], bool]
"""Whether to measure the figure of this name."""

BY_PROCESSOR_TIME = "by_processor_time"
"""Key of the ratio over processor time in a figure's detail."""

_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class TrialValues:
    """One number per trial."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the trials."""
        return median(self.values)

    def over(self, other: TrialValues) -> TrialValues:
        """Divide by the other values, trial by trial."""
        return TrialValues(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def summary(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "median": round(self.median, 4),
            "min": round(min(self.values), 4),
            "max": round(max(self.values), 4),
            "samples": [round(value, 4) for value in self.values],
        }


@dataclass(frozen=True, slots=True)
class Goal:
    """The limit that a figure should reach."""

    limit: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        """Return whether the value reaches the limit."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a report."""

    name: str
    value: float | None
    """None if it could not be measured; ``detail["why"]`` is the reason."""
    unit: str = ""
    goal: Goal | None = None
    ratios: TrialValues | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a value."""
        return None if self.goal is None or self.value is None else self.goal.is_met(self.value)

    @property
    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Name, value, range of the trials, ratio by processor time, goal and verdict, for a table."""
        value = "-" if self.value is None else f"{self.value:.3f} {self.unit}".strip()
        spread = f"{min(self.ratios.values):.2f} .. {max(self.ratios.values):.2f}" if self.ratios else ""
        processor = f"{ratio:.3f}" if (ratio := self.detail.get(BY_PROCESSOR_TIME)) is not None else ""
        verdict = {True: "met", False: "missed", None: ""}[self.met]
        return self.name, value, spread, processor, str(self.goal or ""), verdict

    def summary(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "value": None if self.value is None else round(self.value, 4),
            "unit": self.unit,
            "goal": str(self.goal) if self.goal else None,
            "met": self.met,
            **({"ratios": self.ratios.summary()} if self.ratios else {}),
            **self.detail,
        }

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: not measured, {self.detail.get('why')}"
        _, value, _, processor, goal, verdict = self.cells
        notes = [f"by processor time {processor}"] * bool(processor) + [f"goal {goal}, {verdict}"] * bool(goal)
        return f"{self.name}: {value}" + (f" ({'; '.join(notes)})" if notes else "")


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of one arm, by trial."""

    clock: TrialValues
    processor: TrialValues
    """Tokens per second of processor time."""

    @property
    def tokens_per_s(self) -> float:
        """The median by the clock, rounded for a report."""
        return round(self.clock.median, 2)


def run_alternating(
    arms: Mapping[str, Callable[[int], int]],
    trials: int,
    *,
    prepare: Callable[[str], None] = lambda _: None,
    processor_s: Callable[[], float] = time.process_time,
) -> dict[str, Rates]:
    """Run the arms in turn, in every second trial in the opposite order.

    Args:
        arms: Functions that take the number of the trial and return the number of output tokens.
        trials: How often every arm runs.
        prepare: Called with the name of the arm that runs next; its time counts for no arm.
        processor_s: Returns the processor seconds so far of the process that does the work.
    """
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for trial in range(trials):
        for name in in_turn(arms, trial):
            prepare(name)
            clock, used = time.perf_counter(), processor_s()
            tokens = arms[name](trial)
            rates[name].append((tokens / (time.perf_counter() - clock), tokens / max(processor_s() - used, 1e-6)))
    return {name: Rates(*(TrialValues(column) for column in zip(*rows, strict=True))) for name, rows in rates.items()}


def in_turn(arms: Iterable[str], trial: int) -> list[str]:
    """Return the order of the arms in a trial."""
    return list(arms)[:: 1 if trial % 2 == 0 else -1]


def compare_arms(
    name: str,
    rates: Mapping[str, Rates],
    over: str,
    under: str,
    *,
    goal: Goal | None = None,
    detail: Mapping[str, Any] = MappingProxyType({}),
) -> Figure:
    """Return the figure of one arm over another."""
    ratios = rates[over].clock.over(rates[under].clock)
    compared = {
        "tokens_per_s": {arm: rate.tokens_per_s for arm, rate in rates.items() if arm in (over, under)},
        BY_PROCESSOR_TIME: round(rates[over].processor.over(rates[under].processor).median, 4),
    }
    return Figure(name, ratios.median, goal=goal, ratios=ratios, detail={**compared, **detail})


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all values do not exceed, without interpolation."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def select_figures(only: Sequence[str], names: Sequence[str]) -> Selection:
    """Select the figures whose names begin with one of ``only``, or all."""
    for prefix in only:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"--only {prefix}: no such figure; there are {', '.join(names)}")
    return lambda name: not only or name.startswith(tuple(only))


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run and the machine that they come from."""

    title: str
    machine: Mapping[str, Any]
    code: str
    """Revision of the code that ran."""
    about: Mapping[str, Any]
    """What was run; part of the JSON only."""
    figures: tuple[Figure, ...]

    @property
    def passed(self) -> bool:
        """Whether no goal was missed."""
        return all(figure.met is not False for figure in self.figures)

    def summary(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "machine": self.machine,
            "code": self.code,
            **self.about,
            "figures": {figure.name: figure.summary() for figure in self.figures},
            "passed": self.passed,
        }

    def print(self, *, as_json: bool) -> None:
        """Write JSON or a table to standard output."""
        if as_json:
            sys.stdout.write(json.dumps(self.summary(), indent=2) + "\n")
            return
        table = Table(title=self.title)
        for column in ("figure", "value", "min .. max", "by processor", "goal", ""):
            table.add_column(column, justify="left" if column in ("figure", "") else "right")
        for figure in self.figures:
            table.add_row(*figure.cells)
        Console().print(table)


class Session:
    """One run of a benchmark: the machine and its load before and after, and the time that it took."""

    def __init__(self, threads: int) -> None:
        self.machine = describe_machine(threads)
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run."""
        return round(time.monotonic() - self._started, 1)

    def report(self, title: str, about: Mapping[str, Any], figures: Iterable[Figure]) -> Report:
        """Close the run with a report."""
        machine = {**self.machine, "load_average_after": _load_average()}
        return Report(title, machine, code_revision(), about, tuple(figures))


def describe_machine(threads: int) -> dict[str, Any]:
    """Return processor, cores, memory, versions, threads, and the load average."""
    import psutil
    import torch
    import transformers

    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in _CPU_FLAGS if flag in _cpuinfo("flags").split()],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": threads,
        "load_average": _load_average(),
    }


def _load_average() -> list[float]:
    """Return the runnable processes over the last 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]


def _cpuinfo(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
