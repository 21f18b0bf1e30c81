"""What a benchmark came to: its figures, what they are of, and which of them were asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ops.bench.paired import Figure
from schemas.errors import UserError

Wanted = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run and the machine that they are of."""

    title: str
    machine: Mapping[str, Any]
    code: str
    """Revision of the code that ran."""
    about: Mapping[str, Any]
    """What was run, for the JSON."""
    figures: tuple[Figure, ...]

    @property
    def passed(self) -> bool:
        """Whether every goal was met."""
        return all(figure.met is not False for figure in self.figures)

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "machine": self.machine,
            "code": self.code,
            **self.about,
            "figures": {figure.name: figure.summary() for figure in self.figures},
            "passed": self.passed,
        }

    def print(self, *, as_json: bool) -> None:
        """To standard output: JSON for a program, a table for a person."""
        if as_json:
            sys.stdout.write(json.dumps(self.summary(), indent=2) + "\n")
        else:
            Console().print(as_table(self.title, self.figures))


def as_table(title: str, figures: Sequence[Figure]) -> Table:
    """Figures for a terminal."""
    table = Table(title=title)
    for column in ("figure", "value", "min .. max", "goal", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for figure in figures:
        value = "-" if figure.value is None else f"{figure.value:.3f} {figure.unit}".strip()
        spread = f"{min(figure.samples.values):.2f} .. {max(figure.samples.values):.2f}" if figure.samples else ""
        verdict = {True: "met", False: "missed", None: ""}[figure.met]
        table.add_row(figure.name, value, spread, str(figure.goal or ""), verdict)
    return table


def chosen(only: tuple[str, ...], known: Sequence[str]) -> Wanted:
    """Which figures to measure: those whose names begin as asked, or all.

    Raises:
        UserError: no figure begins so.
    """
    for prefix in only:
        if not any(name.startswith(prefix) for name in known):
            raise UserError(f"--only {prefix}: no such figure; there are {', '.join(known)}")
    return lambda name: not only or name.startswith(only)
