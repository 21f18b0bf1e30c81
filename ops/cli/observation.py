"""``aurora status``, ``top``, ``doctor``, ``lineage`` and ``drift``: observe the running loop."""

from __future__ import annotations

from collections import deque
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ops.cli.terminal import (
    AsJson,
    Config,
    Set,
    echo,
    echo_json,
    echo_note,
    fail,
    load_settings,
    new_table,
    open_tables,
    user_errors,
)

if TYPE_CHECKING:
    from ops.observe.lineage import RequestLineage, VersionLineage
    from schemas.events import DriftEvent

_TRACEPARENT_PARTS = 4


def status(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Show which version is served and how far each stage lags."""
    with user_errors():
        from ops.local import stack
        from ops.observe.status import StatusClient, build_status_table

        settings = load_settings(config, set_)
        state = stack.read_state(settings)
        with closing(StatusClient(stack.running_settings(settings))) as client:
            overview = client.fetch(parts=state.parts if state else {}, count_rows=True)
        if as_json:
            echo(overview.model_dump_json(indent=2))
        if overview.nothing_runs:
            fail("nothing runs here; `aurora up` starts the stack", code=1)
        if not as_json:
            Console().print(build_status_table(overview))


def top(
    config: Config = None,
    set_: Set = None,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two polls.")] = 2.0,
    polls: Annotated[int | None, typer.Option(min=1, help="Exit after this number of polls.")] = None,
) -> None:
    """Watch node, stream, trainer and versions on one screen until Ctrl-C."""
    with user_errors():
        from ops.local import stack
        from ops.observe.top import run_top

        run_top(stack.running_settings(load_settings(config, set_)), every, polls)


def doctor(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Check everything the processes depend on and suggest fixes; exit with code 1 on a problem."""
    with user_errors():
        from ops.local import stack
        from ops.observe.doctor.checks import build_findings_table, run_checks

        findings = []
        with Console(stderr=True).status("checking") as line:
            for finding in run_checks(stack.running_settings(load_settings(config, set_))):
                findings.append(finding)
                line.update(f"checked: {finding.about}")
        if as_json:
            echo_json({"findings": [asdict(one) for one in findings]})
        else:
            Console().print(build_findings_table(findings))
        problems = sum(one.level == "problem" for one in findings)
        if problems:
            fail(f"{problems} to fix", code=1)


def lineage(
    id_: Annotated[str, typer.Argument(metavar="ID", help="Request id, trace id, or traceparent header.")],
    config: Config = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Show the rows of a request, the versions trained on it, their aliases, and when they first drafted."""
    with user_errors():
        settings = load_settings(config, set_)
        from ops.cli.versions import connect_registry
        from ops.observe.lineage import read_lineage

        requests = read_lineage(open_tables(settings), connect_registry(settings), _parse_trace_id(id_))
        if as_json:
            echo_json({"requests": [_lineage_json(one) for one in requests]}, default=str)
            return
        for one in requests:
            _print_lineage(one)


def drift(
    config: Config = None,
    set_: Set = None,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for new events until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Number of newest events.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show changes of the acceptance of a version, oldest first."""
    with user_errors():
        settings = load_settings(config, set_)
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
            _print_drift(event, as_json=as_json)
        if not newest:
            echo_note(f"no drift events in the last {settings.kafka.retention / 3600:g} hours (kafka.retention)")
        for event in events if follow else ():
            if event is not None:
                _print_drift(event, as_json=as_json)


def _print_drift(event: DriftEvent, *, as_json: bool) -> None:
    from ops.observe.status import describe_drift

    if as_json:
        echo(event.model_dump_json())
        return
    time = event.time.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    echo(f"{time}  {describe_drift(event)}; partition {event.partition}")


def _parse_trace_id(text: str) -> str:
    """Return the trace id of a ``traceparent`` header; return other text unchanged."""
    parts = text.split("-")
    return parts[1] if len(parts) == _TRACEPARENT_PARTS and len(parts[0]) == len("00") else text


def _print_lineage(request: RequestLineage) -> None:
    drafted = ", ".join(request.drafted_by) or "no version"
    echo(f"request {request.request}, trace {request.trace}")
    echo(f"served by {request.node} at {request.time:%Y-%m-%d %H:%M:%S}, drafted by {drafted}, line {request.line}")
    rows = new_table("table", "topic", right=("partition", "offsets", "rows", "table versions"))
    for part in request.rows:
        versions = "in flight" if part.last_version is None else _format_range(part.first_version, part.last_version)
        offsets = _format_range(part.first_offset, part.last_offset)
        rows.add_row(part.table, part.topic, str(part.partition), offsets, f"{part.rows:,}", versions)
    versions_table = new_table("version", "trained on it", "registered", "aliases", "first drafted")
    for version in request.versions:
        versions_table.add_row(*_version_cells(version))
    Console().print(rows, "", versions_table, sep="\n")
    first = request.first
    echo("no version is trained on all of it" if first is None else f"first version trained on it: {first.version}")


def _version_cells(version: VersionLineage) -> tuple[str, ...]:
    aliases = ", ".join(f"{move.alias} {move.time:%H:%M:%S}" for move in version.moves)
    served = "-" if version.served is None else f"{version.served:%Y-%m-%d %H:%M:%S}"
    return version.version, version.trained_on, f"{version.registered:%Y-%m-%d %H:%M:%S}", aliases or "-", served


def _format_range(first: int | None, last: int) -> str:
    return str(last) if first in (None, last) else f"{first} to {last}"


def _lineage_json(request: RequestLineage) -> dict[str, Any]:
    versions = [
        {**asdict(version), "moves": [move.model_dump(mode="json") for move in version.moves]}
        for version in request.versions
    ]
    first = request.first
    return {**asdict(request), "versions": versions, "first": None if first is None else first.version}
