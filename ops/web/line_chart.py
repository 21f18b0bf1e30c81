"""A small line chart over time as SVG, for a page without scripts; its colors are the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 22, 26
_GAP_S = 30.0
"""A line is interrupted where no value came for so long."""


@dataclass(frozen=True, slots=True)
class ChartLine:
    """Values over Unix time."""

    points: Sequence[tuple[float, float]]
    color: str
    """Name of a CSS variable, such as ``--series``."""
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class ChartMark:
    """A moment with a name."""

    time: float
    name: str


def draw_lines(lines: Sequence[ChartLine], marks: Sequence[ChartMark], now: float, span_s: float, name: str) -> str:
    """Return a chart of the last ``span_s`` seconds as an ``svg`` element. ``name`` is its text for screen readers."""
    highest = max((value for line in lines for time, value in line.points if time >= now - span_s), default=0.0)
    step = _tick_step(highest)
    top = step * max(1, math.ceil(highest / step))

    def x_of(time: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (1 - (now - time) / span_s)

    def y_of(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / top)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}" font-size="12">']
    for tick in range(round(top / step) + 1):
        y = y_of(tick * step)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="var(--grid)"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{tick * step:g}", "end", "var(--muted)"))
    for quarter in range(5):
        minutes = span_s / 60 * (1 - quarter / 4)
        anchor = ("start", "middle", "middle", "middle", "end")[quarter]
        x = x_of(now - 60 * minutes)
        parts.append(_text(x, _HEIGHT - 6, f"-{minutes:g} min" if minutes else "now", anchor, "var(--muted)"))
    for mark in _place_marks([mark for mark in marks if mark.time >= now - span_s], x_of):
        x = x_of(mark.time)
        upright = f"M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"
        parts.append(f'<path d="{upright}" stroke="var(--muted)" stroke-dasharray="2 3"/>')
        if mark.name:
            parts.append(_text(x, _TOP - 7, mark.name, "middle", "var(--ink)"))
    for line in lines:
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        for run in _split(line.points, now - span_s):
            path = "M" + "L".join(f"{x_of(time):.1f} {y_of(value):.1f}" for time, value in run)
            parts.append(f'<path d="{path}" fill="none" stroke="var({line.color})" stroke-width="2"{dash}/>')
    if not any(time >= now - span_s for line in lines for time, _ in line.points):
        parts.append(_text(_WIDTH / 2, _HEIGHT / 2, "no traffic yet", "middle", "var(--muted)"))
    return "".join(parts) + "</svg>"


def _place_marks(marks: Sequence[ChartMark], x_of: Callable[[float], float]) -> Iterator[ChartMark]:
    """Yield all marks; without its name where it would lie on the one before."""
    end = -math.inf
    for mark in marks:
        half = 4.0 * len(mark.name)
        x = x_of(mark.time)
        fits = x - half > end and x + half < _WIDTH
        yield mark if fits else ChartMark(mark.time, "")
        end = x + half + 4 if fits else end


def _split(points: Sequence[tuple[float, float]], start: float) -> Iterator[list[tuple[float, float]]]:
    """Yield the runs of points without a gap."""
    run: list[tuple[float, float]] = []
    for point in points:
        if point[0] < start:
            continue
        if run and point[0] - run[-1][0] > _GAP_S:
            yield run
            run = []
        run.append(point)
    if run:
        yield run


def _tick_step(highest: float) -> float:
    """Return a round distance between ticks that gives at most five."""
    if highest <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(highest / 4))
    return next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size * 4 >= highest)


def _text(x: float, y: float, text: str, anchor: str, color: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
