"""Screen of the demo: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ops.demo.record import EDGE
from ops.observe.top import events_panel, figures_panel, format_value, sparkline_panel

_LINE_INTERVAL_S = 5.0
_EVENTS = 7
_HEIGHT = 8


@dataclass(frozen=True, slots=True)
class DemoView:
    """Figures at one moment."""

    phase: str
    elapsed_s: float
    total_s: float
    domain: str = ""
    requests: int = 0
    failed: int = 0
    tokens_per_s: float | None = None
    acceptance_length: float | None = None
    """Mean of the last 50 requests."""
    acceptance_lengths: tuple[float, ...] = ()
    """Rolling mean at each request so far."""
    suffix_accepted: float | None = None
    """Accepted tokens per step from the suffix drafter alone, mean of the last 50 requests."""
    speculator_accepted: float | None = None
    """Accepted tokens per step from the speculator, mean of the last 50 requests."""
    draft_depth: int | None = None
    """Draft tokens in a row from the speculator."""
    trace_lag: int | None = None
    step: int = 0
    loss: float | None = None
    registered: int = 0
    promoted: int = 0
    serving: str = ""


class DemoScreen:
    """Show views and print events."""

    def __init__(self, *, live: bool, to_stderr: bool = False) -> None:
        """Write plain lines if ``live`` is false, to stderr if stdout holds the result."""
        self._console = Console(stderr=to_stderr)
        self._live = Live(console=self._console, auto_refresh=False) if live and self._console.is_terminal else None
        self._events: deque[str] = deque(maxlen=_EVENTS)
        self._last_line = 0.0
        self._view: DemoView | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print an event."""
        self._events.append(f"{time.strftime('%H:%M:%S')}  {text}")
        if self._live is None:
            self._print(text)
        elif self._view:
            self.show(self._view)
        else:
            self._live.update(events_panel(tuple(self._events), _EVENTS + 2), refresh=True)

    def show(self, view: DemoView) -> None:
        """Update the screen; print a plain line every five seconds."""
        self._view = view
        if self._live:
            self._live.update(render(view, tuple(self._events)), refresh=True)
        elif time.monotonic() - self._last_line >= _LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            self._print(format_line(view))

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def format_line(view: DemoView) -> str:
    """Return the view as one line."""
    return (
        f"[{_clock(view.elapsed_s)}] {view.phase}: {view.requests} requests, {view.failed} failed, "
        f"{format_value(view.tokens_per_s, '.0f')} tokens/s, "
        f"acceptance length {format_value(view.acceptance_length, '.2f')} "
        f"({format_value(view.suffix_accepted, '+.2f')} suffix drafter, "
        f"{format_value(view.speculator_accepted, '+.2f')} speculator), "
        f"lag {format_value(view.trace_lag, 'd')}, step {view.step}, loss {format_value(view.loss, '.3f')}, "
        f"versions {view.registered} registered {view.promoted} promoted, serving {view.serving or '-'}"
    )


def render(view: DemoView, events: tuple[str, ...]) -> RenderableType:
    """Return the live view."""
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(ratio=1)
    head.add_column(width=30)
    head.add_column(justify="right")
    bar = ProgressBar(total=max(view.total_s, 1), completed=min(view.elapsed_s, view.total_s), width=30)
    head.add_row(Text(view.phase, style="bold cyan"), bar, f"{_clock(view.elapsed_s)} of {_clock(view.total_s)}")
    body = Table.grid(expand=True)
    for _ in range(3):
        body.add_column(ratio=1)
    body.add_row(_serving_panel(view), _acceptance_panel(view), _learning_panel(view))
    spark = sparkline_panel("acceptance length", view.acceptance_lengths)
    return Panel(
        Group(head, body, spark, events_panel(events, _EVENTS + 2)), title="Aurora Stream", border_style="cyan"
    )


def _serving_panel(view: DemoView) -> Panel:
    failed = Text(str(view.failed), style="red" if view.failed else "green")
    rows: dict[str, str | Text] = {
        "traffic": view.domain or "-",
        "requests": str(view.requests),
        "failed": failed,
        "output tokens/s": format_value(view.tokens_per_s, ".1f"),
    }
    return figures_panel("serving", rows, _HEIGHT)


def _acceptance_panel(view: DemoView) -> Panel:
    rows: dict[str, str | Text] = {
        f"last {EDGE}": Text(format_value(view.acceptance_length, ".2f"), style="bold green"),
        "suffix drafter": format_value(view.suffix_accepted, "+.2f"),
        "speculator": format_value(view.speculator_accepted, "+.2f"),
        "its draft depth": format_value(view.draft_depth, "d"),
    }
    return figures_panel("acceptance length", rows, _HEIGHT)


def _learning_panel(view: DemoView) -> Panel:
    rows: dict[str, str | Text] = {
        "trace lag": f"{format_value(view.trace_lag, 'd')} records",
        "step": f"{view.step:,}",
        "loss": format_value(view.loss, ".3f"),
        "registered": str(view.registered),
        "promoted": str(view.promoted),
        "serving": Text(view.serving or "-", style="bold"),
    }
    return figures_panel("learning", rows, _HEIGHT)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
