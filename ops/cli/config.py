"""``aurora config``: show the settings."""

from __future__ import annotations

import json

import typer

from ops.cli.terminal import AsJson, Config, Set, echo, echo_json, load_settings, user_errors

app = typer.Typer(no_args_is_help=True, help="Show the settings.")


@app.callback()
def config() -> None:
    """Keep ``show`` a subcommand: Typer runs a single command without its name."""


@app.command()
def show(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Print the effective settings as TOML; secrets are masked."""
    with user_errors():
        values = load_settings(config, set_).model_dump(mode="json")
        if as_json:
            echo_json(values)
            return
        for section, keys in values.items():
            echo(f"[{section}]")
            for key, value in keys.items():
                echo(f"{key} = {_format_toml(value)}")
            echo("")


def _format_toml(value: object) -> str:
    """Return a value as TOML, which equals JSON except for tables."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{json.dumps(name)} = {json.dumps(option)}" for name, option in value.items()) + "}"
