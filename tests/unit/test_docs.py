"""Pages name only commands, settings, paths and links that exist, and the reference is that of the code."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from ops.cli.main import app
from ops.deploy import chart_schema
from schemas.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WRITTEN = [page for page in PAGES if page.parent.name != "reference" and page.name != "CHANGELOG.md"]


def code_blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def aurora_commands(page: Path) -> Iterator[list[str]]:
    for block in code_blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("aurora "):
                yield shlex.split(line, comments=True)
    for command in re.findall(r"`(aurora [^`]+)`", prose(page)):
        yield shlex.split(command)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page: Path) -> None:
    unknown = []
    for words in aurora_commands(page):
        command: Any = typer.main.get_command(app)
        rest = words[1:]
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        known = {flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]} | {
            "--help"
        }
        flags = {
            word.split("=")[0]
            for word in (rest[: rest.index("--")] if "--" in rest else rest)
            if re.match(r"--?[a-z]", word)
        }
        missing = getattr(command, "commands", None) and rest and re.fullmatch(r"[a-z_-]+", rest[0])
        if missing or flags - known:
            unknown.append(" ".join(words))
    assert unknown == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_settings_exist(page: Path) -> None:
    sections = {name: field.annotation for name, field in Settings.model_fields.items()}
    named = re.findall(rf"`({'|'.join(sections)})\.([a-z_0-9]+)(?: = [^`]*)?`", page.read_text())
    named += re.findall(rf"--set[ =]({'|'.join(sections)})\.([a-z_0-9]+)=", page.read_text())
    for block in code_blocks(page, "toml"):
        for section, body in re.findall(r"^\[(\w+)\]\n((?:[^\[\n].*\n)*)", block, re.MULTILINE):
            named += [(section, key) for key in re.findall(r"^(\w+) =", body, re.MULTILINE)]
    unknown = [f"{section}.{key}" for section, key in named if key not in sections[section].model_fields]  # type: ignore[union-attr]
    assert unknown == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:schemas|serving|pipeline|trainer|ops|tests|docs|requirements)/[^`\s*{}]*)`", page.read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_reference_pages_and_the_schema_of_the_chart_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    built = runpy.run_path(str(ROOT / "docs" / "generate_reference.py"))["pages"]()
    kept = {page.name: page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")}
    assert kept == built, "make reference"
    assert chart_schema.FILE.read_text() == chart_schema.build(), "make reference"
