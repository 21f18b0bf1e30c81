"""A version that passed the gate by a forged tag and drafts nonsense, on a real registry, real tables and a broker."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest
from live_traffic import ServedRequest, rows_of
from promoter_world import figures
from typer.testing import CliRunner

from ops.cli.main import app
from pipeline.delta import DeltaLog
from schemas.settings import Settings, load, to_environ
from schemas.speculator import checkpoint
from schemas.speculator.network import DraftShape, random_draft
from trainer.release.audit import KafkaEvents
from trainer.release.promoter import Promoter
from trainer.release.registry import Line, SpeculatorRegistry

SHAPE = DraftShape(8, 8, 2, 1, 4, 32, 16, 1e-6, 100.0, 64, (1, 2, 3))


class Fleet:
    """Two nodes as far as the tables show them."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self._folder, self._target = settings, folder, uuid.uuid4().hex
        self.registry = SpeculatorRegistry(settings.registry)
        self.tables = DeltaLog(settings.tables)
        self.name = ""

    def register(self, accepted_per_step: float, champion: str, seed: int) -> str:
        folder = self._folder / f"version-{seed}"
        self.name = checkpoint.write_checkpoint(random_draft(SHAPE, seed), folder, self._target).line
        version = self.registry.register(self.name, folder, figures(accepted_per_step, champion, 0.1), {})
        self.registry.set_alias(self.name, "candidate", version)
        return version

    def poll(self) -> Line:
        """A pass of a promoter that knows nothing of the one before; gives the line as nodes see it."""
        promoter = Promoter(self.settings, self.registry, self.tables, KafkaEvents(self.settings.kafka))
        promoter.poll()
        assert promoter.status().error is None
        return next(line for line in self.registry.lines() if line.name == self.name)

    def serve(self, accepted: Mapping[str, int], since: float, slices: int = 60) -> None:
        length = self.settings.canary.slice_duration
        first = (since // length + 1) * length
        self.tables.append(
            "traces",
            rows_of(
                ServedRequest(
                    version, first + at * length, accepted[version], verify_steps=10 + at % 3, node=node, line=self.name
                )
                for at in range(slices)
                for place, node in enumerate("ab")
                for version in [list(accepted)[(at + place) % len(accepted)]]
                for _ in range(3)
            ),
        )


@pytest.fixture
def settings(broker: str, registry: str, tmp_path: Path) -> Settings:
    flags = {
        "kafka.bootstrap_servers": broker,
        "kafka.speculators_topic": f"speculators-{uuid.uuid4().hex[:8]}",
        "registry.tracking_uri": registry,
        "tables.uri": str(tmp_path / "tables"),
        "canary.share": 0.5,
        "canary.slice_duration": 5,
        "canary.burn_in": 0,
        "promoter.canary_min_requests": 100,
    }
    return load(environ={}, flags=flags)


def history(fleet: Fleet) -> list[dict[str, object]]:
    runner = CliRunner()
    told = runner.invoke(app, ["versions", "history", "--line", fleet.name, "--json"], env=to_environ(fleet.settings))
    assert told.exit_code == 0, told.output
    moves: list[dict[str, object]] = json.loads(told.stdout)["moves"]
    return moves


def test_the_canary_analysis_rolls_a_bad_canary_back(settings: Settings, tmp_path: Path) -> None:
    fleet = Fleet(settings, tmp_path)
    good = fleet.register(0.3, "day-0-head-0", 1)
    assert fleet.poll().aliases == {"candidate": good, "champion": good}
    bad = fleet.register(9.0, good, 2)
    tried = fleet.poll()
    assert tried.aliases == {"candidate": bad, "champion": good, "canary": bad}
    fleet.serve({good: 2, bad: 0}, time.time())
    after = fleet.poll()
    assert after.aliases == {"candidate": bad, "champion": good}
    assert tried.audited is not None
    assert after.audited is not None
    assert after.audited.moves > tried.audited.moves
    assert after.audited.aliases == after.aliases
    found = fleet.registry.version(fleet.name, bad)
    assert found is not None
    assert "worse" in (found.quarantined or "")
    last = history(fleet)[-1]
    assert (last["alias"], last["from_version"], last["to_version"], last["actor"]) == ("canary", bad, None, "promoter")
    assert "worse" in str(last["why"])
    assert fleet.poll().aliases == after.aliases


def test_the_watch_rolls_a_bad_champion_back_and_updates_the_audited_tag(settings: Settings, tmp_path: Path) -> None:
    without = settings.canary.model_copy(update={"share": 0.0})
    fleet = Fleet(settings.model_copy(update={"canary": without}), tmp_path)
    good = fleet.register(0.3, "day-0-head-0", 1)
    fleet.poll()
    bad = fleet.register(9.0, good, 2)
    assert fleet.poll().aliases == {"candidate": bad, "champion": bad, "previous": good}
    fleet.serve({good: 2, bad: 0}, time.time())
    after = fleet.poll()
    assert after.aliases == {"candidate": bad, "champion": good, "previous": good}
    assert after.audited is not None
    assert after.audited.aliases == after.aliases
    found = fleet.registry.version(fleet.name, bad)
    assert found is not None
    assert f"against anchor {good}: worse" in (found.quarantined or "")
    assert {row["actor"] for row in history(fleet)} == {"trainer", "promoter"}
