"""``aurora drift``: the changes of acceptance that the stream workers have told, in words."""

from __future__ import annotations

from collections import deque
from typing import Annotated

import typer

from ops.cli.terminal import AsJson, Config, Set, hint, say, settings_of, told
from schemas.events import AcceptanceStats, DriftEvent

DRAFTED_OTHERWISE = 0.1
"""From this share on, a change in how much is drafted is worth a word."""


def drift(
    config: Config = None,
    set_: Set = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on, and show what comes.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="So many of the newest.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show when a version began to be accepted more or less often than before, oldest first."""
    with told():
        settings = settings_of(config, set_)
        from pipeline.drift.monitor import read_events
        from schemas.telemetry import logs

        logs.configure("drift", "warning")
        newest: deque[DriftEvent] = deque(maxlen=limit)
        events = read_events(settings.kafka)
        for event in events:
            if event is None:
                break
            newest.append(event)
        for event in sorted(newest, key=lambda event: event.time):
            _show(event, as_json=as_json)
        if not newest:
            hint(f"no drift was told in the last {settings.kafka.retention / 3600:g} hours (kafka.retention)")
        for event in events if follow else ():
            if event is not None:
                _show(event, as_json=as_json)


def words(event: DriftEvent) -> str:
    """An event as one says it, in the local time."""
    before, after = event.before, event.after
    noticed, since = event.time.astimezone(), event.since.astimezone()
    at = since.strftime("%H:%M" if since.date() == noticed.date() else "%Y-%m-%d %H:%M")
    return (
        f"version {_plain(event.speculator)}{_on(event.label)} is accepted "
        f"{'less' if event.direction == 'fall' else 'more'} often since {at}: its first token "
        f"{after.first_token_acceptance:.0%} instead of {before.first_token_acceptance:.0%}, "
        f"acceptance length {after.acceptance_length:.2f} instead of "
        f"{before.acceptance_length:.2f} ({after.requests:,} requests since, {before.requests:,} before)"
        f"{_drafting(before, after)}"
    )


def _show(event: DriftEvent, *, as_json: bool) -> None:
    noticed = event.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    say(event.model_dump_json() if as_json else f"{noticed}  {words(event)}; partition {event.partition}")


def _drafting(before: AcceptanceStats, after: AcceptanceStats) -> str:
    """Part of the acceptance length's change has its reason in the node where that drafts otherwise."""
    if abs(after.draft_tokens - before.draft_tokens) < DRAFTED_OTHERWISE * before.draft_tokens:
        return ""
    return f"; {after.draft_tokens:.1f} tokens drafted a verify step, {before.draft_tokens:.1f} before"


def _on(label: str | None) -> str:
    return f" on label {_plain(label)}" if label is not None else ""


def _plain(text: str) -> str:
    """Clients choose labels: nothing in them may move the cursor."""
    return text if text.isprintable() else ascii(text)
