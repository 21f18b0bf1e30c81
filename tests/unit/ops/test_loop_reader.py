"""The reader of the loop's page samples the node, and keeps what it read when a part stops answering."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from loop_states import blank
from prometheus_client import CollectorRegistry
from promoter_world import LINE, World, figures

from ops.web import loop_reader
from ops.web.loop_reader import LoopReader
from schemas.settings import Settings, load
from schemas.status import ServeStatus
from trainer.release.registry import Line, RegistryError
from trainer.status import StatusServer


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    made.registry.register("1", figures(1.2, "0", 1.0))
    monkeypatch.setattr(loop_reader, "SpeculatorRegistry", lambda _: made.registry)
    monkeypatch.setattr(loop_reader, "STATUS_INTERVAL_S", 0.02)
    monkeypatch.setattr(loop_reader, "STORE_INTERVAL_S", 0.02)
    return made


def settings_at(folder: Path, node: int) -> Settings:
    """Return settings with a node, and nothing at the ports of the other processes."""
    ports = {"serve.port": node, "stream.port": 1, "train.port": 1, "promoter.port": 1}
    return load(environ={}, flags=ports | {"tables.uri": str(folder)})


def test_samples_are_the_rates_of_the_node(world: World, tmp_path: Path) -> None:
    polls = count()

    def node() -> ServeStatus:
        n = next(polls)
        status: ServeStatus = blank(
            ServeStatus,
            verify_steps=10 * n,
            accepted_tokens=5 * n,
            output_tokens=15 * n,
            requests_finished=n,
            speedup=1.5,
        )
        return status

    with (
        StatusServer("serve", "127.0.0.1", 0, node, CollectorRegistry()) as server,
        LoopReader(settings_at(tmp_path, server.port)) as reader,
    ):
        assert wait_until(lambda: len(reader.state().samples) > 3)
        state = reader.state()
    assert {sample.acceptance_length for sample in state.samples} == {1.5}
    newest = state.samples[-1]
    assert newest.tokens_per_s > 0
    assert newest.undrafted_tokens_per_s == pytest.approx(newest.tokens_per_s / 1.5)
    assert "train.port" in state.overview.silent["train"]


def test_a_part_that_stops_answering_keeps_its_last_value_beside_the_reason(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[Line]:
        raise RegistryError("registry.tracking_uri: no answer")

    with LoopReader(settings_at(tmp_path, 1)) as reader:
        assert wait_until(lambda: reader.state().lines.value is not None)
        monkeypatch.setattr(world.registry, "lines", fail)
        assert wait_until(lambda: reader.state().lines.error is not None)
        lines = reader.state().lines
    assert lines.error == "registry.tracking_uri: no answer"
    assert [one.line.name for one in lines.value or ()] == [LINE]
    assert "serve.port" in reader.state().overview.silent["serve"]
