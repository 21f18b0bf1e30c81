"""Show the whole loop on one terminal screen, from the status endpoints alone (``aurora top``)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ops.observe.status import Overview, StatusClient, describe_drift
from schemas.settings import Settings
from schemas.status import ServeStatus

_HEIGHT = 11
_EVENTS = 6
_HISTORY = 480
"""Polls whose figures are drawn."""
_BARS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 48


@dataclass(frozen=True, slots=True)
class NodeRates:
    """Rates of a node between two polls."""

    tokens_per_s: float
    acceptance_length: float | None
    """None without verify steps."""
    suffix_accepted_per_step: float | None
    """Accepted tokens per step that only the suffix drafter proposed; None without verify steps."""
    requests_per_s: float


def compute_rates(before: ServeStatus, now: ServeStatus, seconds: float) -> NodeRates | None:
    """Return the rates between two polls; None if the node restarted in between."""
    if now.verify_steps < before.verify_steps or now.requests_finished < before.requests_finished:
        return None
    steps, accepted = now.verify_steps - before.verify_steps, now.accepted_tokens - before.accepted_tokens
    suffix_accepted = now.suffix_accepted_tokens - before.suffix_accepted_tokens
    return NodeRates(
        (now.output_tokens - before.output_tokens) / seconds,
        1 + accepted / steps if steps else None,
        suffix_accepted / steps if steps else None,
        (now.requests_finished - before.requests_finished) / seconds,
    )


@dataclass
class History:
    """Recent polls, as many as the screen shows."""

    overview: Overview = field(default_factory=Overview)
    at: float = 0.0
    """Monotonic time of the newest poll in seconds."""
    rates: NodeRates | None = None
    acceptance_lengths: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    token_rates: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    rows_per_s: float | None = None

    def add(self, overview: Overview, at: float) -> None:
        """Add a poll."""
        before, seconds = self.overview, at - self.at
        self.overview, self.at = overview, at
        self.rates = self.rows_per_s = None
        if before.serve and overview.serve:
            self.rates = compute_rates(before.serve, overview.serve, seconds)
        if self.rates:
            self.token_rates.append(self.rates.tokens_per_s)
            if self.rates.acceptance_length is not None:
                self.acceptance_lengths.append(self.rates.acceptance_length)
        if before.stream and overview.stream and overview.stream.rows_written >= before.stream.rows_written:
            self.rows_per_s = (overview.stream.rows_written - before.stream.rows_written) / seconds


def run_top(
    settings: Settings, interval_s: float, polls: int | None, clock: Callable[[], float] = time.monotonic
) -> None:
    """Poll until Ctrl-C or for a number of polls; without a terminal, print each poll."""
    history, console = History(), Console()
    with (
        closing(StatusClient(settings)) as client,
        Live(console=console, auto_refresh=False, screen=polls is None) as live,
    ):
        done = 0
        while polls is None or done < polls:
            if done:
                time.sleep(interval_s)
            history.add(client.fetch(), clock())
            live.update(render_screen(history, interval_s), refresh=True)
            done += 1


def render_screen(history: History, interval_s: float) -> RenderableType:
    """Return the whole screen."""
    overview = history.overview
    body = Table.grid(expand=True)
    for _ in range(2):
        body.add_column(ratio=1)
    body.add_row(_node_panel(history), _trainer_panel(overview))
    body.add_row(_stream_panel(history), _versions_panel(overview))
    return Panel(
        Group(
            body,
            sparkline_panel("acceptance length", history.acceptance_lengths),
            sparkline_panel("output tokens/s", history.token_rates),
            events_panel(_recent_events(overview)[-_EVENTS:], _EVENTS + 2),
        ),
        title="aurora top",
        subtitle=f"every {interval_s:g} s, Ctrl-C ends",
        border_style="cyan",
    )


def _node_panel(history: History) -> Panel:
    node, rates = history.overview.serve, history.rates
    if node is None:
        return _silent_panel("serve", history.overview)
    plain_rate = node.expected_tokens_per_second[0] if node.expected_tokens_per_second else None
    requests_per_s = format_value(rates.requests_per_s if rates else None, ".1f")
    rows: dict[str, str | Text] = {
        "output tokens/s": Text(format_value(rates.tokens_per_s if rates else None, ".1f"), style="bold"),
        "expected without drafting": format_value(plain_rate, ".1f"),
        "speed-up by drafts": Text(_speedup(node), style="bold green" if node.saved_s >= 0 else "bold yellow"),
        "acceptance length": Text(format_value(rates.acceptance_length if rates else None, ".2f"), style="bold green"),
        "suffix drafter": format_value(rates.suffix_accepted_per_step if rates else None, "+.2f"),
        "draft depth": str(node.draft_depth) if node.speculating else "off",
        "requests/s": f"{requests_per_s}, {node.requests_running} running, {node.requests_waiting} waiting",
        "failed": Text(str(node.requests_failed), style="red" if node.requests_failed else "green"),
        "rows dropped": Text(f"{node.rows_dropped:,}", style="yellow" if node.rows_dropped else "green"),
    }
    return figures_panel(f"node {node.node}", rows, _HEIGHT)


def _speedup(node: ServeStatus) -> str:
    return "-" if node.speedup is None else f"{node.speedup:.2f}x, {node.saved_s:+,.0f} s saved"


def _stream_panel(history: History) -> Panel:
    stream = history.overview.stream
    if stream is None:
        return _silent_panel("stream", history.overview)
    seconds = None if stream.last_commit_time is None else max(time.time() - stream.last_commit_time, 0)
    commit_age = "never" if seconds is None else f"{seconds:.0f} s ago"
    dead = sum(stream.dead_letters.values())
    rows: dict[str, str | Text] = {
        "lag, records": f"{history.overview.trace_lag or 0:,}",
        "rows/s": format_value(history.rows_per_s, ".1f"),
        "rows written": f"{stream.rows_written:,}",
        "last commit": commit_age,
        "dead letters": Text(f"{dead:,}", style="yellow" if dead else "green"),
        "lost to retention": Text(f"{stream.records_lost:,}", style="red" if stream.records_lost else "green"),
    }
    return figures_panel("stream", rows, _HEIGHT)


def _trainer_panel(overview: Overview) -> Panel:
    train = overview.train
    if train is None:
        return _silent_panel("train", overview)
    rows: dict[str, str | Text] = {
        "step": f"{train.step:,}",
        "loss": format_value(train.loss, ".3f"),
        "tokens/s": format_value(train.tokens_per_second, ".0f"),
        "acceptance length, held-out": Text(format_value(train.acceptance_length, ".2f"), style="bold green"),
        "lag, commits": f"{overview.table_lag or 0:,}",
        "newest sample": f"{format_value(train.newest_sample_age_s, '.0f')} s old",
        "rollbacks": Text(str(train.rollbacks), style="yellow" if train.rollbacks else "green"),
    }
    return figures_panel("trainer", rows, _HEIGHT)


def _versions_panel(overview: Overview) -> Panel:
    promoter, node = overview.promoter, overview.serve
    if promoter is None:
        return _silent_panel("promoter", overview)
    rows: dict[str, str | Text] = {
        "serving": Text((node and node.speculator) or "-", style="bold"),
        "champion": promoter.champion or "-",
        "candidate": promoter.candidate or "-",
        "previous": promoter.previous or "-",
        "alias moves": str(promoter.alias_moves),
        "verdict": promoter.verdict or "-",
    }
    return figures_panel("versions", rows, _HEIGHT)


def _silent_panel(name: str, overview: Overview) -> Panel:
    reason = Text(overview.silent.get(name, "not polled yet"), style="red")
    return figures_panel(name, {"silent": reason}, _HEIGHT)


def _recent_events(overview: Overview) -> list[str]:
    """Return swaps, rejected versions, drift and training rollbacks, oldest first."""
    events: list[tuple[float, str]] = []
    if node := overview.serve:
        events += [
            (s.time, f"version {s.version} swapped in, {s.pause_ms:.0f} ms, {s.in_flight} requests in flight")
            for s in node.swaps
        ]
        events += [(r.time, f"version {r.version} rejected: {r.why}") for r in node.versions_rejected]
    if stream := overview.stream:
        events += [(event.time.timestamp(), describe_drift(event)) for event in stream.drift.newest]
    lines = [f"{time.strftime('%H:%M:%S', time.localtime(at))}  {text}" for at, text in sorted(events)]
    if overview.train and overview.train.last_rollback:
        lines.append(f"training rolled back: {overview.train.last_rollback}")
    return lines


def figures_panel(title: str, rows: Mapping[str, str | Text], height: int) -> Panel:
    """Return a box with one named figure on each line."""
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, Text(value) if isinstance(value, str) else value)
    return Panel(table, title=title, title_align="left", height=height)


def sparkline_panel(title: str, values: Sequence[float]) -> Panel:
    """Return a box with the history of one figure."""
    return Panel(Text(_sparkline(values), style="green"), title=title, title_align="left")


def events_panel(lines: Sequence[str], height: int) -> Panel:
    """Return a box with events, oldest first."""
    return Panel(Text("\n".join(lines)), title="events", title_align="left", height=height)


def format_value(value: float | None, form: str) -> str:
    """Format a figure, or return a dash for None."""
    return "-" if value is None else format(value, form)


def _sparkline(values: Sequence[float], width: int = _SPARKLINE_WIDTH) -> str:
    """Return a row of bars from zero to the maximum, downsampled to ``width``."""
    if not values:
        return ""
    kept = [values[i * len(values) // width] for i in range(width)] if len(values) > width else list(values)
    kept[-1] = values[-1]
    highest = max(kept) or 1.0
    return "".join(_BARS[round(value / highest * (len(_BARS) - 1))] for value in kept) + f"  {values[-1]:.2f}"
