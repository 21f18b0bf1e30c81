"""Charts: acceptance curves of several variants, and the course of a demo run. All return SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import matplotlib as mpl
from matplotlib.axes import Axes
from numpy import quantile

from ops.demo.comparison import measure_speedup
from ops.demo.record import DemoRun, StackSample, busy_span, rolling_acceptance_length, rolling_suffix_length
from ops.loadgen.load import Response
from ops.report.theme import (
    FAINT,
    INK,
    LEVEL,
    MUTED,
    OTHERS,
    SERIES,
    DomainSpan,
    chart_style,
    new_figure,
    render_empty,
    render_svg,
    shade_domains,
)
from trainer.replay.learning_curve import CurveValue

CURVES_HEIGHT_IN = 3.5
_COLORS = (SERIES, *OTHERS)
_SUFFIX = OTHERS[1]
"""Color of what the suffix drafter contributes."""
_AREA = 0.3
"""Opacity of a filled area."""
_SHOWN_DOTS = 0.95
"""Share of the requests whose dots are certainly below the top edge."""
_ACCEPTANCE_HEIGHT_IN = 3.9
_THROUGHPUT_HEIGHT_IN = 3.2
_LABEL_IN = 0.19
"""Height of a label at the right edge."""
_RATE_WINDOW_S = 15.0
_HEADROOM = 1.25
"""Y axis limit over the largest value: the domain names need the space."""


@dataclass(frozen=True, slots=True)
class VersionMark:
    """Position of a version swap on the x axis."""

    at: float
    label: str


def draw_curves(axes: Axes, curves: Mapping[str, Sequence[CurveValue]]) -> None:
    """Draw acceptance lengths in distinct colors, each curve labelled with its last value at the right edge."""
    top = 1.1 * max([0.1, *(value.accepted_per_step for values in curves.values() for value in values)])
    axes.set_ylim(1, 1 + top)
    axes.set_xlim(0, max(values[-1].tokens for values in curves.values()))
    heights = spread_labels(
        [1 + values[-1].accepted_per_step for values in curves.values()], _LABEL_IN / CURVES_HEIGHT_IN * top
    )
    for i, ((name, values), height) in enumerate(zip(curves.items(), heights, strict=True)):
        color = _COLORS[i % len(_COLORS)]
        axes.plot(*split_axes(values), color=color, linewidth=2.4, solid_capstyle="round")
        _label_end(axes, f"{name} {1 + values[-1].accepted_per_step:.2f}", axes.get_xlim()[1], height, color)


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Return label heights in the given order, raised until all distances are at least ``gap``."""
    placed: dict[int, float] = {}
    lowest = -float("inf")
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        lowest = placed[i] = max(heights[i], lowest + gap)
    return [placed[i] for i in range(len(heights))]


def split_axes(values: Sequence[CurveValue]) -> tuple[list[int], list[float]]:
    """Return the tokens and the acceptance lengths of a curve, whose values are accepted tokens per step."""
    return [value.tokens for value in values], [1 + value.accepted_per_step for value in values]


def label_axes(axes: Axes) -> None:
    """Label the axes of acceptance curves."""
    axes.xaxis.set_major_formatter(lambda tokens, _place: f"{tokens / 1000:g}k" if tokens else "0")
    axes.set_xlabel("tokens of traffic, prompts included", color=MUTED)
    axes.set_ylabel("acceptance length, tokens")


def acceptance_chart(run: DemoRun) -> str:
    """Draw the acceptance length of each request (faint), and its rolling mean with the parts of each source."""
    succeeded = run.succeeded
    with mpl.rc_context(chart_style("acceptance")):
        figure, axes = new_figure(_ACCEPTANCE_HEIGHT_IN)
        if not succeeded:
            return render_empty(figure, axes, "no request succeeded")
        numbers = range(1, len(succeeded) + 1)
        lengths = [1 + request.accepted_tokens / max(request.verify_steps, 1) for request in succeeded]
        total = rolling_acceptance_length(succeeded)
        axes.scatter(numbers, lengths, s=13, color=FAINT, linewidths=0)
        axes.set_xlim(0, len(succeeded) + 1)
        # A few single requests far above the mean would flatten it.
        axes.set_ylim(1, 1 + _HEADROOM * (max([*total, quantile(lengths, _SHOWN_DOTS), 1.1]) - 1))
        _draw_sources(axes, numbers, rolling_suffix_length(succeeded), total)
        _draw_context(axes, domain_spans(succeeded), version_marks(run, succeeded))
        axes.set_xlabel("requests, in the order in which they ended")
        axes.set_ylabel("acceptance length, tokens")
        return render_svg(figure)


def _draw_sources(axes: Axes, numbers: Sequence[int], suffix: Sequence[float], total: Sequence[float]) -> None:
    """Draw the acceptance length with the suffix drafter alone, and the total, each part in its color."""
    labels = [(f"{total[-1]:.2f}", total[-1], SERIES)]
    if max(suffix) > 1:
        axes.fill_between(numbers, 1, suffix, color=_SUFFIX, alpha=_AREA, linewidth=0)
        axes.fill_between(numbers, suffix, total, color=SERIES, alpha=_AREA, linewidth=0)
        labels = [
            (f"+{suffix[-1] - 1:.2f} suffix drafter", (1 + suffix[-1]) / 2, _SUFFIX),
            (f"+{total[-1] - suffix[-1]:.2f} speculator", (suffix[-1] + total[-1]) / 2, SERIES),
            *labels,
        ]
    axes.plot(numbers, total, color=SERIES, linewidth=2.6, solid_capstyle="round")
    gap = _LABEL_IN / _ACCEPTANCE_HEIGHT_IN * (axes.get_ylim()[1] - 1)
    for (text, _, color), height in zip(labels, spread_labels([at for _, at, _ in labels], gap), strict=True):
        _label_end(axes, text, numbers[-1], height, color)


def throughput_chart(run: DemoRun) -> str:
    """Draw output tokens per second over time: of the traffic as a line, of each block of the trials as a bar."""
    trials = (*run.first, *run.measured)
    start, end = busy_span(run.requests)
    end = max([end, *(block.ended for trial in trials for block in trial.blocks)])
    points = traffic_rates(run)
    rates = [*(rate for _, rate in points), *(block.tokens_per_s for trial in trials for block in trial.blocks)]
    with mpl.rc_context(chart_style("throughput")):
        figure, axes = new_figure(_THROUGHPUT_HEIGHT_IN)
        if not rates:
            return render_empty(figure, axes, "no traffic was sampled")
        minutes = [(at - start) / 60 for at, _ in points]
        axes.plot(minutes, [rate for _, rate in points], color=SERIES, linewidth=2.2, solid_capstyle="round")
        for trial in trials:
            for block, color in zip(trial.blocks, (SERIES, LEVEL), strict=True):
                span = (block.started - start) / 60, (block.ended - start) / 60
                axes.plot(span, [block.tokens_per_s] * 2, color=color, linewidth=5, solid_capstyle="butt")
        axes.set_xlim(0, (end - start) / 60)
        axes.set_ylim(0, _HEADROOM * max(rates))
        spans = [DomainSpan((s.start - start) / 60, (s.end - start) / 60, s.name) for s in domain_times(run.requests)]
        marks = [
            VersionMark((swap.time - start) / 60, f"v{swap.version}") for swap in run.swaps if start < swap.time < end
        ]
        _draw_context(axes, spans, marks)
        if speedup := measure_speedup(run.measured):
            gap = _LABEL_IN / _THROUGHPUT_HEIGHT_IN * axes.get_ylim()[1]
            _label_top(axes, (run.measured[0].started - start) / 60, "trainer stopped")
            heights = spread_labels([speedup.plain_tokens_per_s, speedup.tokens_per_s], gap)
            _label_end(axes, f"{speedup.plain_tokens_per_s:.0f} without", axes.get_xlim()[1], heights[0], LEVEL)
            _label_end(axes, f"{speedup.tokens_per_s:.0f} with", axes.get_xlim()[1], heights[1], SERIES)
        axes.set_xlabel("minutes of traffic")
        axes.set_ylabel("output tokens per second")
        return render_svg(figure)


def loss_chart(run: DemoRun) -> str:
    """Draw the training loss over training steps."""
    points = sorted({sample.step: sample.loss for sample in run.samples if sample.loss is not None}.items())
    with mpl.rc_context(chart_style("loss")):
        figure, axes = new_figure(2.7)
        if not points:
            return render_empty(figure, axes, "no training step")
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        axes.plot(steps, losses, color=FAINT, linewidth=1.2)
        axes.plot(steps, smooth(losses), color=SERIES, linewidth=2.4, solid_capstyle="round")
        axes.set_ylim(bottom=0)
        axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        axes.set_xlabel("training steps")
        axes.set_ylabel("loss")
        return render_svg(figure)


def domain_spans(requests: Sequence[Response]) -> list[DomainSpan]:
    """Return the range of request numbers of each domain; a domain starts at its first response."""
    first: dict[str, int] = {}
    for number, request in enumerate(requests, start=1):
        first.setdefault(request.domain, number)
    edges = [*first.values(), len(requests) + 1]
    return [DomainSpan(start - 0.5, end - 0.5, name) for name, start, end in zip(first, edges, edges[1:], strict=False)]


def domain_times(requests: Sequence[Response]) -> list[DomainSpan]:
    """Return the time range in which the requests of each domain started."""
    starts: dict[str, float] = {}
    for request in sorted(requests, key=lambda r: r.started):
        starts.setdefault(request.domain, request.started)
    edges = [*starts.values(), busy_span(requests)[1]]
    return [DomainSpan(start, end, name) for name, start, end in zip(starts, edges, edges[1:], strict=False)]


def version_marks(run: DemoRun, requests: Sequence[Response]) -> list[VersionMark]:
    """Return the position of each swap among the responses; omit swaps after the last response."""
    ended = [request.ended for request in requests]
    marks = [VersionMark(sum(end <= swap.time for end in ended) + 0.5, f"v{swap.version}") for swap in run.swaps]
    return [mark for mark in marks if mark.at < len(requests)]


def traffic_rates(run: DemoRun) -> list[tuple[float, float]]:
    """Return times and output tokens per second of the traffic after the first trials."""
    start, end = busy_span(run.requests)
    start = max([start, *(block.ended for trial in run.first for block in trial.blocks)])
    rates = sample_rates([sample for sample in run.samples if start <= sample.time <= end])
    return [(at, rate) for at, rate in rates if at >= start + _RATE_WINDOW_S / 2]


def sample_rates(samples: Sequence[StackSample]) -> list[tuple[float, float]]:
    """Return times and the output tokens per second in a sliding window around them."""
    rates = []
    first = 0
    for last, sample in enumerate(samples):
        while samples[first].time < sample.time - _RATE_WINDOW_S:
            first += 1
        span = sample.time - samples[first].time
        if last > first and span > _RATE_WINDOW_S / 2:
            tokens = sample.output_tokens - samples[first].output_tokens
            rates.append((sample.time - span / 2, tokens / span))
    return rates


def smooth(values: Sequence[float], width: int = 15) -> list[float]:
    """Return the running median, which ignores a single outlier."""
    half = width // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _label_end(axes: Axes, text: str, x: float, y: float, color: str) -> None:
    axes.annotate(
        text,
        (x, y),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=color,
        fontweight="bold",
        annotation_clip=False,
    )


def _label_top(axes: Axes, x: float, text: str) -> None:
    """Write a name below the top edge, as those of the domains."""
    axes.annotate(
        text,
        (x, 1),
        (0, -6),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        color=MUTED,
        fontsize=11,
    )


def _draw_context(axes: Axes, spans: Sequence[DomainSpan], marks: Sequence[VersionMark]) -> None:
    """Shade the domains and draw version swaps as lines with their names above the top edge."""
    shade_domains(axes, spans)
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
