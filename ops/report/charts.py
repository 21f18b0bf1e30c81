"""The charts of the report, from a record of the run to SVG text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import matplotlib as mpl
from matplotlib.axes import Axes

from ops.demo.record import Answered, Run, Sample, busy_span, rolling_accepted_per_step, tokens_per_s
from ops.report.canvas import FAINT, INK, LEVEL, MUTED, SERIES, Span, figure_of, nothing, shade, style, svg

_RATE_OVER_S = 15.0
_HEADROOM = 1.25
"""Of the y axis, over what is drawn: the names of the domains stand there."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A version boundary on the x axis."""

    at: float
    label: str


def accepted_per_step_chart(run: Run) -> str:
    """Accepted tokens per step over requests: each one faint, the rolling mean strong."""
    answered = run.succeeded
    with mpl.rc_context(style("accept")):
        figure, axes = figure_of(3.9)
        if not answered:
            return nothing(figure, axes, "no request was answered")
        numbers = range(1, len(answered) + 1)
        each = [request.accepted / max(request.verify_steps, 1) for request in answered]
        axes.scatter(numbers, each, s=13, color=FAINT, linewidths=0)
        rolling = rolling_accepted_per_step(answered)
        axes.plot(numbers, rolling, color=SERIES, linewidth=2.6, solid_capstyle="round")
        axes.set_xlim(0, len(answered) + 1)
        axes.set_ylim(0, _HEADROOM * max([*each, 0.1]))
        axes.annotate(
            f"{rolling[-1]:.2f}",
            (numbers[-1], rolling[-1]),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=SERIES,
            fontweight="bold",
            annotation_clip=False,
        )
        _context(axes, domain_spans(answered), version_marks(run, answered))
        axes.set_xlabel("requests, in the order in which they ended")
        axes.set_ylabel("drafted tokens accepted per verify step")
        return svg(figure)


def throughput_chart(run: Run) -> str:
    """Output tokens per second over time, beside the level without speculation."""
    start, end = busy_span(run.requests)
    points = [(time - start, rate) for time, rate in rates(run.samples) if start + _RATE_OVER_S / 2 <= time <= end]
    with mpl.rc_context(style("throughput")):
        figure, axes = figure_of(3.2)
        if not points:
            return nothing(figure, axes, "no traffic was seen")
        minutes = [seconds / 60 for seconds, _ in points]
        values = [rate for _, rate in points]
        axes.plot(minutes, values, color=SERIES, linewidth=2.2, solid_capstyle="round")
        level = tokens_per_s(run.plain, *busy_span(run.plain))
        if level is not None:
            axes.axhline(level, color=LEVEL, linewidth=1.8, linestyle=(0, (5, 3)))
            axes.annotate(
                f"without speculation {level:.0f}",
                (1, level),
                (-4, 5),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                color=LEVEL,
                fontweight="bold",
            )
        axes.set_xlim(0, max((end - start) / 60, minutes[-1]))
        axes.set_ylim(0, _HEADROOM * max([*values, level or 0]))
        spans = [Span((s.start - start) / 60, (s.end - start) / 60, s.name) for s in domain_times(run.requests)]
        marks = [Mark((swap.time - start) / 60, f"v{swap.version}") for swap in run.swaps if start < swap.time < end]
        _context(axes, spans, marks)
        axes.set_xlabel("minutes of traffic")
        axes.set_ylabel("output tokens per second")
        return svg(figure)


def loss_chart(run: Run) -> str:
    """Training loss over steps."""
    points = sorted({sample.step: sample.loss for sample in run.samples if sample.loss is not None}.items())
    with mpl.rc_context(style("loss")):
        figure, axes = figure_of(2.7)
        if not points:
            return nothing(figure, axes, "the trainer took no step")
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        axes.plot(steps, losses, color=FAINT, linewidth=1.2)
        axes.plot(steps, smoothed(losses), color=SERIES, linewidth=2.4, solid_capstyle="round")
        axes.set_ylim(bottom=0)
        axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        axes.set_xlabel("training steps")
        axes.set_ylabel("loss")
        return svg(figure)


def domain_spans(answered: Sequence[Answered]) -> list[Span]:
    """Where each domain's requests lie, by their number; a domain begins with its first answer."""
    first: dict[str, int] = {}
    for number, request in enumerate(answered, start=1):
        first.setdefault(request.domain, number)
    edges = [*first.values(), len(answered) + 1]
    return [Span(start - 0.5, end - 0.5, name) for name, start, end in zip(first, edges, edges[1:], strict=False)]


def domain_times(requests: Sequence[Answered]) -> list[Span]:
    """From when to when each domain's requests were begun."""
    starts: dict[str, float] = {}
    for request in sorted(requests, key=lambda r: r.started):
        starts.setdefault(request.domain, request.started)
    edges = [*starts.values(), busy_span(requests)[1]]
    return [Span(start, end, name) for name, start, end in zip(starts, edges, edges[1:], strict=False)]


def version_marks(run: Run, answered: Sequence[Answered]) -> list[Mark]:
    """After how many answers each version took over; those that nobody was served by are left out."""
    ended = [request.ended for request in answered]
    marks = [Mark(sum(end <= swap.time for end in ended) + 0.5, f"v{swap.version}") for swap in run.swaps]
    return [mark for mark in marks if mark.at < len(answered)]


def rates(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Time and output tokens per second around it, over a sliding window."""
    found = []
    first = 0
    for last, sample in enumerate(samples):
        while samples[first].time < sample.time - _RATE_OVER_S:
            first += 1
        span = sample.time - samples[first].time
        if last > first and span > _RATE_OVER_S / 2:
            tokens = sample.output_tokens - samples[first].output_tokens
            found.append((sample.time - span / 2, tokens / span))
    return found


def smoothed(values: Sequence[float], width: int = 15) -> list[float]:
    """Running median, which a single bad step does not bend."""
    half = width // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _context(axes: Axes, spans: Sequence[Span], marks: Sequence[Mark]) -> None:
    """Domains as shaded stretches, versions as lines with their names above the top edge."""
    shade(axes, spans)
    for mark in marks:
        axes.axvline(mark.at, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            mark.label,
            (mark.at, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=10,
        )
