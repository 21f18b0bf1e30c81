"""``aurora bench`` reports user errors in one line with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_target import write_tiny_target
from typer.testing import CliRunner, Result

from ops.cli.main import app


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.mark.parametrize(
    "command", ["speculator", "serving", "soak", "stream", "loop", "learning", "trainer", "update"]
)
def test_an_unknown_setting_is_one_line_and_exit_code_2(command: str) -> None:
    invoked = bench(command, "--set", "serve.prot=1")
    error = "aurora: serve.prot: unknown setting; did you mean 'serve.port'?\n"
    assert (invoked.exit_code, invoked.stderr) == (2, error)


@pytest.mark.parametrize(
    ("command", "first"),
    [("serving", "ours_vs_generate"), ("stream", "ratio_to_bare_loop_64k"), ("trainer", "ratio_to_best_peer")],
)
def test_an_unknown_figure_lists_the_known_ones(command: str, first: str) -> None:
    invoked = bench(command, "--only", "speed")
    assert invoked.exit_code == 2
    assert f"--only speed: no such figure; there are {first}," in invoked.stderr


def test_a_soak_without_a_trained_speculator_names_the_command_that_trains_one(tmp_path: Path) -> None:
    target = write_tiny_target(tmp_path / "target")
    invoked = bench("soak", "--set", f"target.path={target}", "--speculator", "mine")
    assert invoked.exit_code == 2
    assert "no speculator 'mine'" in invoked.stderr
    assert "aurora bench speculator" in invoked.stderr


def test_an_unknown_domain_of_the_loop_lists_the_known_ones() -> None:
    invoked = bench("loop", "--domains", "code,poems")
    assert invoked.exit_code == 2
    assert (
        invoked.stderr
        == "aurora: --domains code,poems: name two of code, math, sql, chat, edits, tools, as in code,math\n"
    )


def test_an_unwritable_page_is_reported_before_anything_runs(tmp_path: Path) -> None:
    invoked = bench("loop", "--html", str(tmp_path))
    assert invoked.exit_code == 2
    assert invoked.stderr == f"aurora: --html {tmp_path}: Is a directory\n"


def test_too_few_requests_for_a_held_out_set_are_rejected() -> None:
    assert bench("speculator", "--requests", "24").exit_code == 2
