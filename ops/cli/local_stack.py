"""``aurora up``, ``aurora down`` and ``aurora demo``: the whole stack on one machine."""

from __future__ import annotations

import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ops.cli.terminal import AsJson, Config, Set, echo, load_settings, user_errors

if TYPE_CHECKING:
    from ops.local.stack import Stack
    from ops.observe.status import Overview, StatusClient

_COLORS = {"ready": "green", "gave up": "red", "down": "yellow"}
_POLL_S = 2.0


def up(
    config: Config = None,
    set_: Set = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the stack is ready.")] = False,
) -> None:
    """Start the whole stack on this machine and keep it running."""
    with user_errors():
        from ops.local import stack

        settings = load_settings(config, set_)
        if detach:
            stack.up_detached(settings, echo)
            page = stack.page_address(settings)
            echo(f"the stack is ready; {page} and `aurora status` show it, `aurora down` stops it")
        else:
            # Ctrl-C and SIGTERM are how this command ends.
            with suppress(KeyboardInterrupt), _StatusLine() as line:
                stack.up(settings, line.print, line.update)


def down(config: Config = None, set_: Set = None) -> None:
    """Stop the stack that runs in this folder."""
    with user_errors():
        from ops.local import stack

        stopped = stack.down(load_settings(config, set_))
        echo("stopped" if stopped else "nothing runs here")


def demo(
    config: Config = None,
    set_: Set = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the data of earlier runs.")] = False,
    minutes: Annotated[float, typer.Option(min=2, help="Length of the demo in minutes.")] = 9.5,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=8, help="Maximum output tokens of a request.")] = 64,
    as_json: AsJson = False,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Print plain lines instead of a live screen.")] = False,
) -> None:
    """Run the whole loop with an untrained speculator on real prompts and write a report."""
    with user_errors():
        from ops.demo.run import DemoOptions, run

        options = DemoOptions(fresh, minutes, concurrency, max_tokens, as_json, not no_ui)
        raise typer.Exit(run(load_settings(config, set_), options))


class _StatusLine:
    """Status of the stack on the last line of the terminal; without a terminal, events only."""

    def __init__(self) -> None:
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._client: StatusClient | None = None
        self._overview: Overview | None = None
        self._polled = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._client:
            self._client.close()

    def print(self, text: str) -> None:
        """Print an event above the line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, running: Stack) -> None:
        """Update the line; poll the processes every two seconds."""
        if not self._console.is_terminal:
            return
        if self._client is None:
            from ops.observe.status import StatusClient

            self._client = StatusClient(running.settings)
        if self._overview is None or time.monotonic() - self._polled > _POLL_S:
            self._overview = self._client.fetch()
            self._polled = time.monotonic()
        line = Text()
        for name, part in running.supervisor.parts.items():
            line.append(f"{name} {part.state}  ", style=_COLORS.get(str(part.state), "dim"))
        line.append(_summarize(self._overview))
        self._live.update(line, refresh=True)


def _summarize(overview: Overview) -> str:
    """Return the main figures on one line."""
    figures = []
    if serve := overview.serve:
        figures.append(
            f"serving {serve.speculator or 'without speculation'}, {serve.requests_finished:,} requests finished"
        )
    if overview.trace_lag is not None:
        figures.append(f"stream lag {overview.trace_lag:,} records")
    if train := overview.train:
        figures.append(f"step {train.step:,}")
    return " · ".join(figures)
