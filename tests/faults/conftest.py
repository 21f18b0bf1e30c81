"""Fixtures of the fault campaigns: their size, and a summary line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from campaign import Campaign, Tally
from stream_worker import stream_settings

from schemas.settings import Settings

TALLY = pytest.StashKey[Tally]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run campaigns in full size: a million verify steps, twenty minutes"
    )
    parser.addoption("--json", type=Path, metavar="FILE", help="write the totals as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Tally()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not is_full(config) and config.stash[TALLY].rows:
        terminalreporter.write_line(config.stash[TALLY].line())


def pytest_unconfigure(config: pytest.Config) -> None:
    file: Path | None = config.getoption("json", default=None)
    if file:
        file.write_text(json.dumps(vars(config.stash[TALLY]), indent=2))
    if is_full(config):
        print(config.stash[TALLY].line())


def is_full(config: pytest.Config) -> bool:
    """Return whether campaigns run in full size. Runs that start in another folder do not have the option."""
    return bool(config.getoption("full", default=False))


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Return whether campaigns run in full size."""
    return is_full(pytestconfig)


@pytest.fixture
def settings(broker: str, tmp_path: Path, free_port: Callable[[], int]) -> Settings:
    """Return settings with a topic, a group and tables of the test."""
    return stream_settings(broker, tmp_path, free_port())


@pytest.fixture
def new_campaign(tmp_path: Path, pytestconfig: pytest.Config) -> Callable[..., Campaign]:
    """Return a function that creates a campaign. It prints progress in full size, otherwise only on failure."""
    plugins = pytestconfig.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    assert reporter is not None
    assert capture is not None

    def say(text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        if not is_full(pytestconfig):
            print(line)
            return
        with capture.global_and_fixture_disabled():
            reporter.write_line(line)

    return partial(Campaign, folder=tmp_path, tally=pytestconfig.stash[TALLY], say=say)
