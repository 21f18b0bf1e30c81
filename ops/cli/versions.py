"""``aurora versions`` and ``aurora history``: what is registered, how versions differ, and every move of an alias."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from ops.cli.terminal import AsJson, Config, Set, opened, say, settings_of, told
from ops.observe.lines import connect, line_of, version_of
from ops.observe.panels import grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schemas.events import AliasMoved
    from schemas.speculator.checkpoint import Manifest
    from trainer.release.registry import Line, Version

app = typer.Typer(no_args_is_help=True, help="Speculator versions: list, show, diff.")

OfLine = Annotated[str | None, typer.Option("--line", help="Speculator line; that of the settings where not given.")]
_JSON_TAGS = ("settings", "tables", "metrics", "held_out")


@app.command("list")
def list_(config: Config = None, set_: Set = None, line: OfLine = None, as_json: AsJson = False) -> None:
    """List the versions of a line: what names them, what they came from, what they are worth."""
    with told():
        settings = settings_of(config, set_)
        registry = connect(settings)
        of = line_of(settings, registry, line)
        listed = [_plain(version, of) for version in registry.versions(of.name)]
        if as_json:
            sys.stdout.write(json.dumps({"line": of.name, "versions": listed}, indent=2) + "\n")
            return
        say(f"line {of.name}")
        Console().print(_as_table(listed))


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="A number or an alias.")],
    config: Config = None,
    set_: Set = None,
    line: OfLine = None,
    as_json: AsJson = False,
) -> None:
    """Show a version whole: its card, its files with their hashes, its tags, and what has named it."""
    with told():
        settings = settings_of(config, set_)
        registry = connect(settings)
        of = line_of(settings, registry, line)
        found = version_of(registry, of, version)
        with tempfile.TemporaryDirectory() as folder:
            manifest = _manifest(registry.download(of.name, found.number, Path(folder)))
        moves = [move for move in _moves(settings, of.name) if found.number in (move.from_version, move.to_version)]
        if as_json:
            whole = {
                **_plain(found, of),
                "card": found.card,
                "tags": {name: _parsed(name, value) for name, value in found.tags.items()},
                "files": manifest.sha256,
                "moves": [move.model_dump(mode="json") for move in moves],
            }
            sys.stdout.write(json.dumps(whole, indent=2) + "\n")
            return
        console = Console()
        console.print(Markdown(found.card or f"Version {found.number} has no card."))
        files = grid("file", "SHA-256")
        for name, digest in manifest.sha256.items():
            files.add_row(name, digest)
        console.print(files)
        if found.quarantined:
            console.print(f"in quarantine: {found.quarantined}", style="red", markup=False)
        if moves:
            console.print(moves_table(moves))


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="A number or an alias.")],
    new: Annotated[str, typer.Argument(help="Another.")],
    config: Config = None,
    set_: Set = None,
    line: OfLine = None,
    as_json: AsJson = False,
) -> None:
    """Say in what two versions differ: settings, data, code, figures, and how far each tensor has moved."""
    with told():
        settings = settings_of(config, set_)
        registry = connect(settings)
        of = line_of(settings, registry, line)
        versions = [version_of(registry, of, name) for name in (old, new)]
        facts = [dict(_facts(version.tags)) for version in versions]
        changed = {
            name: [one.get(name) for one in facts]
            for name in sorted({*facts[0], *facts[1]})
            if facts[0].get(name) != facts[1].get(name)
        }
        with tempfile.TemporaryDirectory() as folder:
            folders = [registry.download(of.name, v.number, Path(folder) / v.number) for v in versions]
            moved = _moved(folders, of.name)
        numbers = [version.number for version in versions]
        if as_json:
            sys.stdout.write(json.dumps({"versions": numbers, "changed": changed, "moved": moved}, indent=2) + "\n")
            return
        table = grid("", *(f"version {number}" for number in numbers))
        for name, values in changed.items():
            table.add_row(name, *("-" if value is None else escape(str(value)) for value in values))
        weights = grid("tensor", right=("moved by",))
        for name, share in moved.items():
            weights.add_row(name, f"{share:.2%}")
        Console().print(table, "", weights, sep="\n")


def history(
    config: Config = None,
    set_: Set = None,
    line: OfLine = None,
    count: Annotated[int, typer.Option("-n", min=1, help="So many of the newest moves.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show who or what moved which alias, when and why, and what was begun and not finished."""
    with told():
        settings = settings_of(config, set_)
        tables = opened(settings)
        from trainer.release.audit import Ledger, read_moves

        moves = [move for move in read_moves(tables) if line in (None, move.line)][-count:]
        abandoned = [row for row in Ledger(tables, "intents").read() if row["note"] and line in (None, row["line"])]
        if as_json:
            told_moves = [move.model_dump(mode="json") for move in moves]
            stopped = [{"time": row["time"].isoformat(), "line": row["line"], "why": row["note"]} for row in abandoned]
            sys.stdout.write(json.dumps({"moves": told_moves, "abandoned": stopped}, indent=2) + "\n")
            return
        Console().print(moves_table(moves))
        for row in abandoned[-count:]:
            say(f"{row['time']:%Y-%m-%d %H:%M:%S}  abandoned: {row['note']}")


def moves_table(moves: Sequence[AliasMoved]) -> Table:
    """Moves, newest last."""
    table = grid("time", "alias", "from", "to", "by", "why")
    for move in moves:
        to = move.to_version or "-"
        table.add_row(
            f"{move.time:%Y-%m-%d %H:%M:%S}", move.alias, move.from_version or "-", to, move.actor, escape(move.why)
        )
    return table


def _moves(settings: Any, line: str) -> list[AliasMoved]:
    """The recorded moves of a line; none where there are no tables on this machine."""
    from schemas.errors import UserError
    from trainer.release.audit import read_moves

    with suppress(UserError):
        return [move for move in read_moves(opened(settings)) if move.line == line]
    return []


def _plain(version: Version, line: Line) -> dict[str, Any]:
    held = _parsed("held_out", version.tags.get("held_out", "{}"))
    held = held if isinstance(held, dict) else {}
    return {
        "version": version.number,
        "aliases": sorted(alias for alias, number in line.aliases.items() if number == version.number),
        "registered": version.registered.isoformat(),
        "parent": version.tags.get("parent"),
        "accepted_per_step": held.get("accepted_per_step"),
        "champion": held.get("champion"),
        "champion_accepted_per_step": held.get("champion_accepted_per_step"),
        "quarantined": version.quarantined,
    }


def _as_table(listed: Sequence[Mapping[str, Any]]) -> Table:
    table = grid(
        "version", "named", "registered", "parent", "against", "quarantine", right=("accepted tokens per step", "of it")
    )
    for one in listed:
        aged = datetime.now(UTC) - datetime.fromisoformat(one["registered"])
        lengths = (
            "-" if one[name] is None else f"{one[name]:.3f}"
            for name in ("accepted_per_step", "champion_accepted_per_step")
        )
        table.add_row(
            one["version"],
            ", ".join(one["aliases"]),
            _ago(aged.total_seconds()),
            one["parent"] or "-",
            one["champion"] or "-",
            escape(one["quarantined"] or ""),
            *lengths,
        )
    return table


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _facts(tags: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    """Everything that tags tell, flat: a setting, a table version or a figure each."""
    for name, value in tags.items():
        yield from _flat(name, _parsed(name, value))


def _flat(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value


def _parsed(name: str, value: str) -> Any:
    if name in _JSON_TAGS:
        with suppress(ValueError):
            return json.loads(value)
    return value


def _manifest(folder: Path) -> Manifest:
    from schemas.speculator.checkpoint import MANIFEST, Manifest

    return Manifest.model_validate_json((folder / MANIFEST).read_text())


def _moved(folders: Sequence[Path], line: str) -> dict[str, float]:
    """Of each tensor, the norm of its change over its own norm."""
    from schemas.speculator import checkpoint

    before, after = (checkpoint.read(folder, line).state_dict() for folder in folders)
    return {
        name: float((after[name] - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in before.items()
        if value.is_floating_point()
    }
