"""``aurora trace``: what became of a request, from its rows to the versions that learned from it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ops.cli.terminal import AsJson, Config, Set, opened, say, settings_of, told
from ops.observe.lines import connect
from ops.observe.panels import grid

if TYPE_CHECKING:
    from ops.observe.lineage import Reader, Trail

_HEADER_PARTS = 4


def trace(
    named: Annotated[str, typer.Argument(metavar="ID", help="Of a request or of a trace, or a traceparent header.")],
    config: Config = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Follow a request: its rows, the versions that learned from it, what named those and when they first drafted."""
    with told():
        settings = settings_of(config, set_)
        from ops.observe.lineage import trails

        found = trails(opened(settings), connect(settings), _trace_id(named))
        if as_json:
            sys.stdout.write(json.dumps({"requests": [_plain(one) for one in found]}, indent=2, default=str) + "\n")
            return
        for one in found:
            _show(one)


def _trace_id(named: str) -> str:
    """The trace id of a ``traceparent``; anything else as it is."""
    parts = named.split("-")
    return parts[1] if len(parts) == _HEADER_PARTS and len(parts[0]) == len("00") else named


def _show(found: Trail) -> None:
    drafted = ", ".join(found.drafted_by) or "nobody"
    say(f"request {found.request}, trace {found.trace}")
    say(f"answered by {found.node} at {found.time:%Y-%m-%d %H:%M:%S}, drafted by {drafted}, line {found.line}")
    rows = grid("table", "topic", right=("partition", "offsets", "rows", "versions of the table"))
    for part in found.rows:
        versions = "on its way" if part.last_version is None else _range(part.first_version, part.last_version)
        offsets = _range(part.first_offset, part.last_offset)
        rows.add_row(part.table, part.topic, str(part.partition), offsets, f"{part.rows:,}", versions)
    readers = grid("version", "learned from it", "registered", "named by", "first drafted")
    for reader in found.versions:
        readers.add_row(*_reader(reader))
    Console().print(rows, "", readers, sep="\n")
    first = found.first
    say("no version has learned from all of it yet" if first is None else f"first learned by version {first.version}")


def _reader(reader: Reader) -> tuple[str, ...]:
    named = ", ".join(f"{move.alias} {move.time:%H:%M:%S}" for move in reader.moves)
    served = "-" if reader.served is None else f"{reader.served:%Y-%m-%d %H:%M:%S}"
    return reader.version, reader.taught, f"{reader.registered:%Y-%m-%d %H:%M:%S}", named or "-", served


def _range(first: int | None, last: int) -> str:
    return str(last) if first in (None, last) else f"{first} to {last}"


def _plain(found: Trail) -> dict[str, Any]:
    readers = [
        {**asdict(reader), "moves": [move.model_dump(mode="json") for move in reader.moves]}
        for reader in found.versions
    ]
    first = found.first
    return {**asdict(found), "versions": readers, "first": None if first is None else first.version}
