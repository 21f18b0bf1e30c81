"""Settings, metrics, commands, status fields and modules use the glossary: each concept has one name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main
from click import Command, Group

from ops.cli.main import app
from schemas import status
from schemas.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("schemas", "serving", "pipeline", "trainer", "ops")


class Term(NamedTuple):
    """A row of the glossary."""

    name: str
    fragments: tuple[str, ...]
    unused: tuple[str, ...]


def glossary() -> list[Term]:
    terms = []
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0] not in {"Term", "---"}:
            unused = tuple(word.strip() for word in cells[3].split(",") if word.strip())
            terms.append(Term(cells[0], tuple(re.findall(r"`([^`]+)`", cells[2])), unused))
    return terms


def settings_names() -> Iterator[str]:
    for section, field in Settings.model_fields.items():
        yield section
        assert isinstance(field.annotation, type)
        yield from (f"{section}.{name}" for name in field.annotation.model_fields)  # type: ignore[attr-defined]


def commands(command: Command, path: str) -> Iterator[str]:
    """Names of commands and options with their help."""
    yield f"{path} {command.help or ''}"
    for parameter in command.params:
        yield f"{path} {' '.join(parameter.opts)} {getattr(parameter, 'help', '') or ''}"
    if isinstance(command, Group):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}")


def metric_names() -> Iterator[str]:
    text = "\n".join(file.read_text() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    yield from re.findall(r"aurora_(?:serve|stream|train|promoter|sglang|vllm)_[a-z0-9_]+", text)


def status_fields() -> Iterator[str]:
    for name, model in vars(status).items():
        if name.endswith("Status"):
            yield from (f"{name}.{field}" for field in getattr(model, "model_fields", ()))


def modules() -> Iterator[str]:
    for folder in FOLDERS:
        yield from (str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("*.py"))


def log_events() -> Iterator[str]:
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and ast.unparse(node.func.value) == "log"
                    and node.args
                    and isinstance(node.args[0], ast.Constant)
                ):
                    yield str(node.args[0].value)


def shown() -> list[str]:
    """Everything that a user meets by name."""
    return [
        *settings_names(),
        *commands(typer.main.get_command(app), "aurora"),
        *metric_names(),
        *status_fields(),
        *modules(),
        *log_events(),
    ]


def words(text: str) -> str:
    """Lower-case words: ``VersionCache.rows_dropped`` becomes ``version cache rows dropped``."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return f" {' '.join(re.findall(r'[a-z0-9]+', spaced.lower()))} "


def test_the_glossary_is_read() -> None:
    assert {"bonus token", "acceptance length", "held-out set"} <= {term.name for term in glossary()}


@pytest.mark.parametrize("term", glossary(), ids=lambda term: term.name)
def test_every_term_is_used(term: Term) -> None:
    code = "\n".join(file.read_text() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    assert [fragment for fragment in term.fragments if fragment not in code] == []


def test_no_concept_has_two_names() -> None:
    names = [(name, words(name)) for name in shown()]
    unused = [(word, term.name) for term in glossary() for word in term.unused]
    found = [
        f"{name}: write {term!r} instead of {word!r}"
        for word, term in unused
        for name, text in names
        if words(word) in text
    ]
    assert found == []
