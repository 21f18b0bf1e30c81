"""``aurora versions``: list, show and compare registered versions, and show the history of alias moves."""

from __future__ import annotations

import json
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

from ops.cli.terminal import AsJson, Config, Set, echo, echo_json, load_settings, new_table, open_tables, user_errors
from schemas.errors import UserError
from schemas.events import ALIASES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schemas.events import AliasMoved
    from schemas.settings import Settings
    from schemas.speculator.checkpoint import Manifest
    from trainer.release.registry import Line, SpeculatorRegistry, Version

app = typer.Typer(no_args_is_help=True, help="Inspect, promote and roll back speculator versions.")

LineOption = Annotated[str | None, typer.Option("--line", help="Speculator line. Default: line of the settings.")]
_JSON_TAGS = ("settings", "tables", "metrics", "held_out")


@app.command("list")
def list_(config: Config = None, set_: Set = None, line: LineOption = None, as_json: AsJson = False) -> None:
    """List the versions of a line with aliases, parent and held-out acceptance length."""
    with user_errors():
        settings = load_settings(config, set_)
        registry = connect_registry(settings)
        of = find_line(settings, registry, line)
        listed = [describe_version(version, of) for version in registry.versions(of.name)]
        if as_json:
            echo_json({"line": of.name, "versions": listed})
            return
        echo(f"line {of.name}")
        Console().print(_build_table(listed))


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="Number or alias.")],
    config: Config = None,
    set_: Set = None,
    line: LineOption = None,
    as_json: AsJson = False,
) -> None:
    """Show the card, files, tags and alias moves of a version."""
    with user_errors():
        settings = load_settings(config, set_)
        registry = connect_registry(settings)
        of = find_line(settings, registry, line)
        found = find_version(registry, of, version)
        with tempfile.TemporaryDirectory() as folder:
            manifest = _read_manifest(registry.download(of.name, found.number, Path(folder)))
        moves = [
            move for move in _read_moves(settings, of.name) if found.number in (move.from_version, move.to_version)
        ]
        if as_json:
            details = {
                **describe_version(found, of),
                "card": found.card,
                "tags": {name: _parse_tag(name, value) for name, value in found.tags.items()},
                "files": manifest.sha256,
                "moves": [move.model_dump(mode="json") for move in moves],
            }
            echo_json(details)
            return
        console = Console()
        console.print(Markdown(found.card or f"Version {found.number} has no card."))
        files = new_table("file", "SHA-256")
        for name, digest in manifest.sha256.items():
            files.add_row(name, digest)
        console.print(files)
        if found.quarantined:
            console.print(f"in quarantine: {found.quarantined}", style="red", markup=False)
        if moves:
            console.print(build_moves_table(moves))


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="Number or alias.")],
    new: Annotated[str, typer.Argument(help="Number or alias.")],
    config: Config = None,
    set_: Set = None,
    line: LineOption = None,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: settings, data, code, figures, and the relative change of each tensor."""
    with user_errors():
        settings = load_settings(config, set_)
        registry = connect_registry(settings)
        of = find_line(settings, registry, line)
        versions = [find_version(registry, of, name) for name in (old, new)]
        facts = [dict(_flatten_tags(version.tags)) for version in versions]
        changed = {
            name: [one.get(name) for one in facts]
            for name in sorted({*facts[0], *facts[1]})
            if facts[0].get(name) != facts[1].get(name)
        }
        with tempfile.TemporaryDirectory() as folder:
            folders = [registry.download(of.name, v.number, Path(folder) / v.number) for v in versions]
            moved = _relative_changes(folders, of.name)
        numbers = [version.number for version in versions]
        if as_json:
            echo_json({"versions": numbers, "changed": changed, "moved": moved})
            return
        table = new_table("", *(f"version {number}" for number in numbers))
        for name, values in changed.items():
            table.add_row(name, *("-" if value is None else escape(str(value)) for value in values))
        weights = new_table("tensor", right=("relative change",))
        for name, share in moved.items():
            weights.add_row(name, f"{share:.2%}")
        Console().print(table, "", weights, sep="\n")


@app.command()
def history(
    config: Config = None,
    set_: Set = None,
    line: LineOption = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Number of newest moves.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show who moved which alias, when and why, and the abandoned moves."""
    with user_errors():
        settings = load_settings(config, set_)
        tables = open_tables(settings)
        from trainer.release.audit import Ledger, read_moves

        moves = [move for move in read_moves(tables) if line in (None, move.line)][-count:]
        abandoned = [row for row in Ledger(tables, "intents").read() if row["note"] and line in (None, row["line"])]
        if as_json:
            abandoned_json = [
                {"time": row["time"].isoformat(), "line": row["line"], "why": row["note"]} for row in abandoned
            ]
            echo_json({"moves": [move.model_dump(mode="json") for move in moves], "abandoned": abandoned_json})
            return
        Console().print(build_moves_table(moves))
        for row in abandoned[-count:]:
            echo(f"{row['time']:%Y-%m-%d %H:%M:%S}  abandoned: {row['note']}")


def build_moves_table(moves: Sequence[AliasMoved]) -> Table:
    """Return a table of moves, newest last."""
    table = new_table("time", "alias", "from", "to", "by", "why")
    for move in moves:
        to = move.to_version or "-"
        table.add_row(
            f"{move.time:%Y-%m-%d %H:%M:%S}", move.alias, move.from_version or "-", to, move.actor, escape(move.why)
        )
    return table


def _read_moves(settings: Any, line: str) -> list[AliasMoved]:
    """Return the recorded moves of a line; empty without local tables."""
    from trainer.release.audit import read_moves

    with suppress(UserError):
        return [move for move in read_moves(open_tables(settings)) if move.line == line]
    return []


def describe_version(version: Version, line: Line) -> dict[str, Any]:
    """Return number, aliases, parent and held-out figures of a version, for tables and JSON."""
    figures = _parse_tag("held_out", version.tags.get("held_out", "{}"))
    figures = figures if isinstance(figures, dict) else {}
    return {
        "version": version.number,
        "aliases": sorted(alias for alias, number in line.aliases.items() if number == version.number),
        "registered": version.registered.isoformat(),
        "parent": version.tags.get("parent"),
        "acceptance_length": _add_bonus(figures.get("accepted_per_step")),
        "champion": figures.get("champion"),
        "champion_acceptance_length": _add_bonus(figures.get("champion_accepted_per_step")),
        "gain_low": figures.get("gain_low"),
        "gain_high": figures.get("gain_high"),
        "quarantined": version.quarantined,
    }


def _build_table(listed: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(
        "version",
        "aliases",
        "registered",
        "parent",
        "champion",
        "quarantine",
        right=("acceptance length", "champion's", "gain"),
    )
    for one in listed:
        aged = datetime.now(UTC) - datetime.fromisoformat(one["registered"])
        lengths = (
            "-" if one[name] is None else f"{one[name]:.3f}"
            for name in ("acceptance_length", "champion_acceptance_length")
        )
        table.add_row(
            one["version"],
            ", ".join(one["aliases"]),
            _ago(aged.total_seconds()),
            one["parent"] or "-",
            one["champion"] or "-",
            escape(one["quarantined"] or ""),
            *lengths,
            "-" if one["gain_low"] is None else f"{one['gain_low']:+.3f} to {one['gain_high']:+.3f}",
        )
    return table


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _flatten_tags(tags: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    """Yield each setting, table version and figure of the tags by its dotted name."""
    for name, value in tags.items():
        yield from _flatten(name, _parse_tag(name, value))


def _flatten(name: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{name}.{key}", inner)
    else:
        yield name, value


def _parse_tag(name: str, value: str) -> Any:
    if name in _JSON_TAGS:
        with suppress(ValueError):
            return json.loads(value)
    return value


def _read_manifest(folder: Path) -> Manifest:
    from schemas.speculator.checkpoint import MANIFEST, Manifest

    return Manifest.model_validate_json((folder / MANIFEST).read_text())


def _relative_changes(folders: Sequence[Path], line: str) -> dict[str, float]:
    """Return the norm of each tensor's change, divided by that of the tensor; of the head, for the tokens of both."""
    from schemas.speculator import checkpoint

    before, after = (checkpoint.read_checkpoint(folder, line).state_dict() for folder in folders)
    both_V = before["t2d"] & after["t2d"]
    for state in (before, after):
        state["lm_head.weight"] = state["lm_head.weight"][(state["t2d"].cumsum(0) - 1)[both_V]]
    return {
        name: float((after[name] - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in before.items()
        if value.is_floating_point()
    }


def _add_bonus(accepted_per_step: float | None) -> float | None:
    """Convert accepted tokens per step to an acceptance length."""
    return None if accepted_per_step is None else 1 + accepted_per_step


def connect_registry(settings: Settings) -> SpeculatorRegistry:
    """Return the registry after a first answer.

    Raises:
        UserError: the registry does not answer.
    """
    from trainer.release.registry import RegistryError, SpeculatorRegistry

    registry = SpeculatorRegistry(settings.registry)
    try:
        registry.lines()
    except RegistryError as error:
        raise UserError(f"{error}; start it, or set registry.tracking_uri") from error
    return registry


def find_line(settings: Settings, registry: SpeculatorRegistry, named: str | None) -> Line:
    """Return the named line, or the only line of the registry, or the line of the settings.

    Raises:
        UserError: no such line, or an ambiguous choice; the message lists the lines.
    """
    lines = {line.name: line for line in registry.lines()}
    if not lines:
        raise UserError(
            f"no versions at {settings.registry.tracking_uri} (registry.tracking_uri); the trainer registers them"
        )
    if named is not None:
        if found := lines.get(named):
            return found
        raise UserError(f"no line {named!r} at {settings.registry.tracking_uri}; there are {', '.join(sorted(lines))}")
    if len(lines) == 1:
        return next(iter(lines.values()))
    ours = _read_settings_line(settings)
    if ours in lines:
        return lines[ours]
    raise UserError(f"--line: none of the lines is that of target.path; there are {', '.join(sorted(lines))}")


def find_version(registry: SpeculatorRegistry, line: Line, named: str) -> Version:
    """Return the version with a number or an alias.

    Raises:
        UserError: the line has no such version.
    """
    number = line.aliases.get(named, named)
    if named in ALIASES and named not in line.aliases:
        raise UserError(f"line {line.name}: no version is {named}; {_describe_aliases(line)}")
    found = registry.version(line.name, number) if number.isdecimal() else None
    if found is None:
        raise UserError(f"line {line.name} has no version {named!r}; `aurora versions list` shows them")
    return found


def _describe_aliases(line: Line) -> str:
    return ", ".join(f"{alias} is {version}" for alias, version in line.aliases.items()) or "no alias is set"


def _read_settings_line(settings: Settings) -> str | None:
    from schemas.speculator.checkpoint import CheckpointError
    from schemas.speculator.day_0_draft import read_line

    try:
        return read_line(settings.target, settings.speculator).name
    except CheckpointError:
        return None  # without the target on this machine, several lines need --line
