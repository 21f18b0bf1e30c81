"""Pages claim only figures that a command reports, and judge them with the defaults that users get."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from ops.bench import prompts
from ops.bench.harness import select_figures
from ops.bench.loop import loop_benchmark
from ops.bench.serving import concurrent_requests, serving_benchmark
from ops.bench.stream import stream_benchmark
from ops.bench.trainer import trainer_benchmark
from ops.demo.record import DemoRun, summarize_run

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
RESULTS, METHODS = DOCS / "benchmarks" / "results.md", DOCS / "benchmarks" / "methods.md"
PAGES = [
    page for page in (ROOT / "README.md", *DOCS.rglob("*.md")) if page.parent.name not in {"benchmarks", "reference"}
]
REPORTED: Mapping[str, list[str]] = {
    "aurora bench serving": serving_benchmark.figure_names(concurrent_requests.FULL),
    "aurora bench stream": stream_benchmark.figure_names(),
    "aurora bench trainer": trainer_benchmark.figure_names(trainer_benchmark.FULL),
    "aurora bench loop": [
        *loop_benchmark.figure_names(prompts.ALL_DOMAINS),
        *loop_benchmark.figure_names(prompts.ALL_DOMAINS, imported=True),
    ],
    "make demo": list(summarize_run(DemoRun(started=0, ended=1))),
}
"""Names of the figures that a command reports."""
SPEED = re.compile(r"\b\d+\.\d+(x\b| times as fast)")


@dataclass(frozen=True)
class Table:
    """A table of a page, and the command that reports its figures."""

    command: str
    header: str
    rows: tuple[str, ...]

    @property
    def is_judged(self) -> bool:
        return any(re.search(r"\bmet\b|\bmissed\b", row) for row in self.rows)

    @property
    def names(self) -> list[str]:
        """Names in the first column, where it has any: a name that begins with _ ends the one before it."""
        return [name for row in self.rows for name in names_in(row.split("|")[1])] if "| figure" in self.header else []


def names_in(cell: str) -> Iterator[str]:
    whole = ""
    for name in re.findall(r"`([^`]+)`", cell):
        if not name.startswith("_"):
            whole = re.escape(name).replace(r"\*", ".*")
            yield re.sub("<[a-zA-Z]+>", "[a-z0-9]+", whole)
        else:
            # It replaces the end of the name before it, which may have any length.
            yield "(" + "|".join(re.escape(whole[:end]) for end in range(len(whole) + 1)) + ")" + re.escape(name)


def run_commands(text: str) -> list[str]:
    """The commands in a text that report figures."""
    quoted = re.findall(r"`(aurora bench [^`]+)`", text) + re.findall(
        r"^(make demo|aurora bench .*?)(?: *#.*)?$", text, re.MULTILINE
    )
    return [command for command in quoted if reporting(command) in REPORTED]


def reporting(command: str) -> str:
    return " ".join(command.split()[:3]) if command.startswith("aurora") else " ".join(command.split()[:2])


def tables_in(page: Path) -> Iterator[Table]:
    """The tables of a page, each with the last command before it in its section."""
    for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]:
        for found in re.finditer(r"^(\|.*\n)\|[-| ]+\|\n((?:\|.*\n)+)", section, re.MULTILINE):
            if commands := run_commands(section[: found.start()]):
                yield Table(commands[-1], found[1], tuple(found[2].splitlines()))


def unknown_names(table: Table) -> list[str]:
    reported = REPORTED[reporting(table.command)]
    return [name for name in table.names if not any(re.fullmatch(name, one) for one in reported)]


@pytest.mark.parametrize("page", [RESULTS, METHODS], ids=lambda page: page.name)
def test_every_figure_of_a_table_is_reported_by_the_command_before_it(page: Path) -> None:
    tables = list(tables_in(page))
    assert sum(len(table.names) for table in tables) > 20
    assert [(table.command, name) for table in tables for name in unknown_names(table)] == []


def test_outcomes_are_those_of_the_defaults_or_their_header_names_the_setting() -> None:
    judged = [table for table in tables_in(RESULTS) if table.is_judged]
    assert {reporting(table.command) for table in judged} == REPORTED.keys() - {"make demo"}
    for table in judged:
        changed = re.findall(r"--set[ =](\S+)", table.command)
        assert [setting for setting in changed if f"`{setting}`" not in table.header] == [], table.command


@pytest.mark.parametrize("page", [RESULTS, METHODS], ids=lambda page: page.name)
def test_selected_figures_exist(page: Path) -> None:
    for command in run_commands(page.read_text()):
        words = shlex.split(command)
        only = [after for word, after in pairwise(words) if word == "--only"]
        select_figures(only, REPORTED[reporting(command)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_claimed_speed_names_its_figure_and_the_page_runs_its_command_with_defaults(page: Path) -> None:
    paragraphs = re.split(r"\n\n+", page.read_text())
    commands = run_commands(page.read_text())
    for before, paragraph in zip(["", *paragraphs], paragraphs, strict=False):
        claims = SPEED.findall(paragraph)
        named = set(re.findall(r"`(\w+)`", f"{before}\n{paragraph}"))
        by = [command for command in commands if named & set(REPORTED[reporting(command)])]
        assert not claims or by, paragraph
        assert not claims or not any("--set" in command for command in by), by


def test_the_readme_claims_a_speed() -> None:
    assert SPEED.search((ROOT / "README.md").read_text())
