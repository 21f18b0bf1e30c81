"""``aurora top``: the loop in a terminal, from the status pages of the processes alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ops.cli.drift import words
from ops.observe import panels
from ops.observe.panels import number, panel
from ops.observe.status import Gatherer, Overview
from schemas.settings import Settings
from schemas.status import ServeStatus

_HEIGHT = 9
_EVENTS = 6
_KEPT = 480
"""Looks whose figures are drawn."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What a node did between two looks."""

    tokens_per_s: float
    acceptance_length: float | None
    """1 + accepted tokens per verify step (bonus token included); None without a verify step."""
    requests_per_s: float


def pace(before: ServeStatus, now: ServeStatus, seconds: float) -> Pace | None:
    """The pace of a node between two looks; None where it was restarted in between."""
    if now.verify_steps < before.verify_steps or now.requests_finished < before.requests_finished:
        return None
    verify_steps, kept = now.verify_steps - before.verify_steps, now.accepted_tokens - before.accepted_tokens
    return Pace(
        (now.output_tokens - before.output_tokens) / seconds,
        1 + kept / verify_steps if verify_steps else None,
        (now.requests_finished - before.requests_finished) / seconds,
    )


@dataclass
class Course:
    """What was seen so far, as much as the screen shows of it."""

    overview: Overview = field(default_factory=Overview)
    at: float = 0.0
    """Monotonic seconds of the newest look."""
    pace: Pace | None = None
    acceptance_lengths: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    rows_per_s: float | None = None

    def add(self, overview: Overview, at: float) -> None:
        """Take another look."""
        before, seconds = self.overview, at - self.at
        self.overview, self.at = overview, at
        self.pace = self.rows_per_s = None
        if before.serve and overview.serve:
            self.pace = pace(before.serve, overview.serve, seconds)
        if self.pace:
            self.rates.append(self.pace.tokens_per_s)
            if self.pace.acceptance_length is not None:
                self.acceptance_lengths.append(self.pace.acceptance_length)
        if before.stream and overview.stream and overview.stream.rows_written >= before.stream.rows_written:
            self.rows_per_s = (overview.stream.rows_written - before.stream.rows_written) / seconds


def watch(settings: Settings, every_s: float, looks: int | None, clock: Callable[[], float] = time.monotonic) -> None:
    """Look again and again, until Ctrl-C or after so many looks; without a terminal each look is printed."""
    course, console = Course(), Console()
    with (
        closing(Gatherer(settings)) as gatherer,
        Live(console=console, auto_refresh=False, screen=looks is None) as live,
    ):
        number_of = 0
        while looks is None or number_of < looks:
            if number_of:
                time.sleep(every_s)
            course.add(gatherer.gather(), clock())
            live.update(render(course, every_s), refresh=True)
            number_of += 1


def render(course: Course, every_s: float) -> RenderableType:
    """The whole screen."""
    overview = course.overview
    body = Table.grid(expand=True)
    for _ in range(2):
        body.add_column(ratio=1)
    body.add_row(_serving(course), _learning(overview))
    body.add_row(_stream(course), _versions(overview))
    return Panel(
        Group(
            body,
            panels.course("acceptance length", course.acceptance_lengths),
            panels.course("output tokens/s", course.rates),
            panels.events(_told(overview)[-_EVENTS:], _EVENTS + 2),
        ),
        title="aurora top",
        subtitle=f"every {every_s:g} s, Ctrl-C ends",
        border_style="cyan",
    )


def _serving(course: Course) -> Panel:
    node, now = course.overview.serve, course.pace
    if node is None:
        return _silent("serve", course.overview)
    alone = node.expected_tokens_per_second[0] if node.expected_tokens_per_second else None
    running = f"{node.requests_running} run, {node.requests_waiting} wait"
    rows: dict[str, str | Text] = {
        "output tokens/s": Text(number(now.tokens_per_s if now else None, ".1f"), style="bold"),
        "expected without drafting": number(alone, ".1f"),
        "acceptance length": Text(number(now.acceptance_length if now else None, ".2f"), style="bold green"),
        "drafts": str(node.draft_depth) if node.speculating else "off",
        "requests/s": f"{number(now.requests_per_s if now else None, '.1f')}, {running}",
        "failed": Text(str(node.requests_failed), style="red" if node.requests_failed else "green"),
        "rows shed": Text(f"{node.rows_dropped:,}", style="yellow" if node.rows_dropped else "green"),
    }
    return panel(f"node {node.node}", rows, _HEIGHT)


def _stream(course: Course) -> Panel:
    stream = course.overview.stream
    if stream is None:
        return _silent("stream", course.overview)
    dead = sum(stream.dead_letters.values())
    rows: dict[str, str | Text] = {
        "records behind": f"{course.overview.trace_lag or 0:,}",
        "rows/s": number(course.rows_per_s, ".1f"),
        "rows written": f"{stream.rows_written:,}",
        "last commit": _ago(stream.last_commit_time),
        "dead letters": Text(f"{dead:,}", style="yellow" if dead else "green"),
        "lost": Text(f"{stream.records_lost:,}", style="red" if stream.records_lost else "green"),
    }
    return panel("stream", rows, _HEIGHT)


def _learning(overview: Overview) -> Panel:
    train = overview.train
    if train is None:
        return _silent("train", overview)
    rows: dict[str, str | Text] = {
        "step": f"{train.step:,}",
        "loss": number(train.loss, ".3f"),
        "tokens/s": number(train.tokens_per_second, ".0f"),
        "acceptance length, held out": Text(number(train.acceptance_length, ".2f"), style="bold green"),
        "commits behind": f"{overview.table_lag or 0:,}",
        "newest window": f"{number(train.newest_sample_age_s, '.0f')} s old",
        "went back": Text(str(train.rollbacks), style="yellow" if train.rollbacks else "green"),
    }
    return panel("trainer", rows, _HEIGHT)


def _versions(overview: Overview) -> Panel:
    promoter, node = overview.promoter, overview.serve
    if promoter is None:
        return _silent("promoter", overview)
    rows: dict[str, str | Text] = {
        "serving": Text((node and node.speculator) or "-", style="bold"),
        "champion": promoter.champion or "-",
        "candidate": promoter.candidate or "-",
        "previous": promoter.previous or "-",
        "moves": str(promoter.alias_moves),
        "verdict": promoter.verdict or "-",
    }
    return panel("versions", rows, _HEIGHT)


def _ago(unix_time: float | None) -> str:
    return "never" if unix_time is None else f"{max(time.time() - unix_time, 0):.0f} s ago"


def _silent(name: str, overview: Overview) -> Panel:
    return panel(name, {"silent": Text(overview.silent.get(name, "not asked yet"), style="red")}, _HEIGHT)


def _told(overview: Overview) -> list[str]:
    """What happened lately: swaps and refusals of the node, drift, and why training went back; oldest first."""
    told: list[tuple[float, str]] = []
    if node := overview.serve:
        told += [
            (s.time, f"version {s.version} swapped in, {s.pause_ms:.0f} ms, {s.in_flight} requests ran")
            for s in node.swaps
        ]
        told += [(r.time, f"version {r.version} refused: {r.why}") for r in node.versions_rejected]
    if stream := overview.stream:
        told += [(event.time.timestamp(), words(event)) for event in stream.drift.newest]
    lines = [f"{time.strftime('%H:%M:%S', time.localtime(at))}  {text}" for at, text in sorted(told)]
    if overview.train and overview.train.last_rollback:
        lines.append(f"training went back: {overview.train.last_rollback}")
    return lines
