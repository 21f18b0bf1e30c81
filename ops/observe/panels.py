"""Pieces of a screen in a terminal: boxes of named figures, a row of bars for a course, a table without lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 48


def panel(title: str, rows: Mapping[str, str | Text], height: int) -> Panel:
    """A box with a name and a figure on each line."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, Text(value) if isinstance(value, str) else value)
    return Panel(table, title=title, title_align="left", height=height)


def course(title: str, values: Sequence[float]) -> Panel:
    """A box with the course of one figure."""
    return Panel(Text(sparkline(values), style="green"), title=title, title_align="left")


def events(lines: Sequence[str], height: int) -> Panel:
    """A box with what happened, oldest first."""
    return Panel(Text("\n".join(lines)), title="events", title_align="left", height=height)


def sparkline(values: Sequence[float], width: int = _SPARK) -> str:
    """The values as a row of bars from zero to their highest, thinned out to ``width``."""
    if not values:
        return ""
    kept = [values[i * len(values) // width] for i in range(width)] if len(values) > width else list(values)
    kept[-1] = values[-1]
    highest = max(kept) or 1.0
    return "".join(_BARS[round(value / highest * (len(_BARS) - 1))] for value in kept) + f"  {values[-1]:.2f}"


def number(value: float | None, form: str) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def grid(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table without lines; columns of words, then those of numbers."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, overflow="fold", min_width=min(len(column), 12))
    for column in right:
        shown.add_column(column, justify="right")
    return shown
