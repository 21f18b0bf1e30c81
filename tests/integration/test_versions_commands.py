"""``aurora versions`` with a real MLflow server, broker and tables."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
import uuid
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import killed_promoter
import pytest
from killed_promoter import OneLine
from promoter_world import figures
from recorded import record_of, tables_of, verify_step_of
from tiny_draft import SHAPE
from typer.testing import CliRunner, Result

from ops.cli.main import app
from pipeline.delta import DeltaLog
from schemas.events import AUDITED_TAG, AuditState
from schemas.registry_client import delete_artifacts
from schemas.settings import Settings, load
from schemas.speculator import checkpoint
from schemas.speculator.network import random_draft
from trainer.release.alias_moves import AliasMover, MoveError, new_intent, plan_promotion, plan_rollback
from trainer.release.audit import KafkaEvents
from trainer.release.promoter import Promoter
from trainer.release.registration import SETTINGS_TAG, dump_shaping_settings, render_card
from trainer.release.registry import SpeculatorRegistry


class Desk:
    """A line with three versions, each better than the previous one, and the commands on it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.registry = SpeculatorRegistry(settings.registry)
        self.line = ""
        target = uuid.uuid4().hex
        for number, length in enumerate((0.3, 0.5, 0.7), start=1):
            self.line = self._register(folder / str(number), target, number, length)
        self.promoter().poll()

    def _register(self, folder: Path, target: str, number: int, length: float) -> str:
        champion = str(number - 1) if number > 1 else "day-0-head-0"
        rate = self.settings.train.model_copy(update={"learning_rate": 1e-3 * number})
        draft = random_draft(SHAPE, number)
        line = checkpoint.write_checkpoint(draft, folder, target).line
        tags = {
            "line": line,
            "target": target,
            "parent": champion,
            "code": "abc",
            "tables": json.dumps({"accepted": 10 * number}),
            **figures(length, champion, length - 0.2),
            SETTINGS_TAG: dump_shaping_settings(self.settings.model_copy(update={"train": rate})),
        }
        text = render_card(self.settings, SHAPE, tags, {"step": float(number)})
        assert self.registry.register(line, folder, tags, {}, text) == str(number)
        return line

    def promoter(self) -> Promoter:
        tables, registry = DeltaLog(self.settings.tables), OneLine(self.settings, self.line)
        return Promoter(self.settings, registry, tables, KafkaEvents(self.settings.kafka))

    def run(self, *arguments: str, code: int = 0) -> Result:
        flags = ("registry.tracking_uri", "tables.uri", "kafka.bootstrap_servers", "kafka.speculators_topic")
        values = [self.settings.registry.tracking_uri, self.settings.tables.uri]
        values += [self.settings.kafka.bootstrap_servers, self.settings.kafka.speculators_topic]
        given = [f"--set={flag}={value}" for flag, value in zip(flags, values, strict=True)]
        result = CliRunner().invoke(app, ["versions", *arguments, f"--line={self.line}", *given])
        assert result.exit_code == code, result.output
        return result

    def asked(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    @property
    def aliases(self) -> dict[str, str]:
        return self.registry.aliases(self.line)

    @property
    def stamp(self) -> AuditState:
        model = self.registry._client.get_registered_model(f"aurora.{self.line}")
        return AuditState.model_validate_json(model.tags[AUDITED_TAG])


@pytest.fixture
def desk(broker: str, registry: str, tmp_path: Path) -> Desk:
    flags = {
        "kafka.bootstrap_servers": broker,
        "kafka.speculators_topic": f"speculators-{uuid.uuid4().hex[:8]}",
        "registry.tracking_uri": registry,
        "tables.uri": str(tmp_path / "tables"),
        "promoter.gate_min_samples": 4,
    }
    DeltaLog(load(environ={}, flags=flags).tables).create()
    return Desk(load(environ={}, flags=flags), tmp_path)


def test_promotions_and_rollbacks_are_in_the_history(desk: Desk) -> None:
    desk.run("promote", "1")
    desk.run("promote", "2", "--why", "better on code")
    assert desk.aliases == {"champion": "2", "previous": "1"}
    desk.promoter().poll()
    rolled_back = desk.run("rollback", "--why", "slow on sql")
    assert "champion: 2 -> 1" in rolled_back.stdout
    assert desk.aliases == {"champion": "1", "previous": "1"}
    assert "nothing to roll back to" in desk.run("rollback", code=2).stderr
    moves = desk.asked("history")["moves"]
    assert [(m["alias"], m["from_version"], m["to_version"], m["why"]) for m in moves] == [
        ("champion", None, "1", "promote: manual"),
        ("champion", "1", "2", "promote: better on code"),
        ("previous", None, "1", "promote: better on code"),
        ("champion", "2", "1", "rollback: slow on sql"),
    ]
    assert (desk.stamp.moves, desk.stamp.aliases) == (4, {"champion": "1", "previous": "1"})
    listed = {one["version"]: one for one in desk.asked("list")["versions"]}
    assert listed["2"]["quarantined"] == "rolled back: slow on sql"
    assert sorted(listed["1"]["aliases"]) == ["champion", "previous"]
    refused = desk.run("promote", "2", code=2)
    assert "is in quarantine: rolled back: slow on sql; --force" in refused.stderr
    desk.run("promote", "2", "--force")
    assert desk.aliases == {"champion": "2", "previous": "1"}
    assert desk.registry.version(desk.line, "2").quarantined is None  # type: ignore[union-attr]


def test_a_version_rejected_by_the_gate_needs_force_and_a_dry_run_changes_nothing(desk: Desk) -> None:
    refused = desk.run("promote", "2", code=2)
    assert "champion is day-0, waiting for the next candidate; --force" in refused.stderr
    output = desk.run("promote", "2", "--force", "--dry-run")
    assert "champion: none -> 2" in output.stdout
    assert desk.aliases == {}
    assert desk.asked("history") == {"moves": [], "abandoned": []}
    assert "nothing to roll back to" in desk.run("rollback", code=2).stderr
    assert "no version '9'" in desk.run("promote", "9", code=2).stderr
    assert "no version is canary" in desk.run("promote", "canary", code=2).stderr


def test_a_canary_is_promoted_by_its_alias(desk: Desk) -> None:
    desk.run("promote", "1")
    desk.run("promote", "2", "--to", "canary")
    assert desk.aliases == {"champion": "1", "canary": "2"}
    desk.run("promote", "canary")
    assert desk.aliases == {"champion": "2", "previous": "1"}


def test_show_and_diff_print_details_of_versions(desk: Desk) -> None:
    desk.run("promote", "1")
    shown = desk.asked("show", "champion")
    assert shown["files"].keys() == {"config.json", "model.safetensors"}
    assert shown["tags"]["tables"] == {"accepted": 10}
    assert shown["moves"][0]["to_version"] == "1"
    assert f"`{desk.line}`" in shown["card"]
    assert "trained on" in desk.run("show", "1").stdout
    compared = desk.asked("diff", "1", "2")
    assert compared["changed"]["settings.train.learning_rate"] == [0.001, 0.002]
    assert compared["changed"]["tables.accepted"] == [10, 20]
    assert compared["moved"]["fc.weight"] > 1
    assert set(desk.asked("diff", "1", "1")["moved"].values()) == {0.0}


def test_an_alias_moved_in_mlflow_is_recorded_and_kept(desk: Desk) -> None:
    desk.run("promote", "1")
    desk.registry.set_alias(desk.line, "champion", "3")
    desk.promoter().poll()
    assert desk.aliases["champion"] == "3"
    last = desk.asked("history")["moves"][-1]
    assert (last["from_version"], last["to_version"], last["actor"]) == ("1", "3", "unknown")
    assert desk.stamp.aliases["champion"] == "3"


def test_a_move_works_without_a_broker(desk: Desk, free_port: Any) -> None:
    away = desk.settings.kafka.model_copy(update={"bootstrap_servers": f"127.0.0.1:{free_port()}"})
    desk.settings = desk.settings.model_copy(update={"kafka": away})
    output = desk.run("promote", "1")
    assert "the promoter sends the event" in output.stderr
    assert len(desk.asked("history")["moves"]) == 1


WRITES = ["row of the candidate", "stamp", "intent", "previous", "champion", "done", "row", "row", "stamp"]


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """A forkserver with the promoter's imports, for processes that start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_promoter"])
    return context


@pytest.mark.parametrize("writes", range(len(WRITES)), ids=lambda n: f"{n}-{WRITES[n]}".replace(" ", "-"))
def test_a_promoter_killed_at_any_step_leaves_a_legal_state(
    desk: Desk, processes: ForkServerContext, writes: int
) -> None:
    desk.run("promote", "1")
    desk.registry.set_alias(desk.line, "candidate", "2")
    killed = processes.Process(target=killed_promoter.poll, args=(desk.settings, desk.line, writes))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    between = {**desk.aliases}
    desk.promoter().poll()
    assert desk.aliases == {"champion": "2", "previous": "1", "candidate": "2"}, between
    moved = [m for m in desk.asked("history")["moves"] if m["to_version"] == "2" and m["alias"] == "champion"]
    assert [m["actor"] for m in moved] == ["promoter"]
    assert desk.stamp.aliases == desk.aliases
    assert [state for _, state in AliasMover(DeltaLog(desk.settings.tables), desk.registry).intents(desk.line)][
        -1
    ] == "done"


def test_of_two_concurrent_moves_exactly_one_wins(desk: Desk) -> None:
    desk.run("promote", "1")
    start, outcomes = threading.Barrier(2), dict[str, str]()

    def move(version: str) -> None:
        mover = AliasMover(DeltaLog(desk.settings.tables), SpeculatorRegistry(desk.settings.registry))
        changes = plan_promotion({"champion": "1"}, version, watched=True)
        wanted = new_intent(desk.line, "promote", changes, actor=version, why="race")
        start.wait()
        try:
            mover.move(wanted)
            outcomes[version] = "moved"
        except MoveError:
            outcomes[version] = "refused"

    threads = [threading.Thread(target=move, args=(version,)) for version in ("2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes.values()) == ["moved", "refused"]
    (winner,) = (version for version, outcome in outcomes.items() if outcome == "moved")
    assert desk.aliases == {"champion": winner, "previous": "1"}


def test_a_command_finishes_an_unfinished_move_and_stops(desk: Desk) -> None:
    desk.run("promote", "1")
    desk.run("promote", "2")
    mover = AliasMover(DeltaLog(desk.settings.tables), desk.registry)
    assert mover.find_open(desk.line) is None
    wanted = new_intent(desk.line, "rollback", plan_rollback(desk.aliases, "1"), actor="someone", why="slow")
    assert mover._write(wanted, "intended")
    stopped = desk.run("rollback", code=2)
    assert "which is now finished; nothing else was done" in stopped.stderr
    assert desk.aliases == {"champion": "1", "previous": "1"}
    assert desk.asked("history")["moves"][-1]["actor"] == "someone"


def test_prune_deletes_versions_and_files_that_nothing_needs(desk: Desk) -> None:
    run = desk.registry.version(desk.line, "1").run  # type: ignore[union-attr]
    planned = desk.asked("prune", "--keep", "1", "--dry-run")
    assert planned["deleted"] == ["1"]
    assert planned["kept"] == {"3": "among the newest", "2": "parent of 3"}
    assert [one.number for one in desk.registry.versions(desk.line)] == ["1", "2", "3"]
    assert desk.asked("prune", "--keep", "1")["deleted"] == ["1"]
    assert [one.number for one in desk.registry.versions(desk.line)] == ["2", "3"]
    assert desk.registry._client.list_artifacts(run) == []
    assert desk.asked("prune", "--keep", "1")["deleted"] == []


def test_prune_keeps_what_is_named_or_was_served_lately(desk: Desk) -> None:
    steps = [verify_step_of(0, 0, [1, 2], 3)]
    rows = tables_of(record_of("request", steps, 0, line=desk.line))
    DeltaLog(desk.settings.tables).append("traces", rows["traces"])
    assert desk.asked("prune", "--keep", "1", "--dry-run", "--served", "2020-01-01")["kept"]["1"] == "served by a node"
    desk.run("promote", "1")
    assert desk.asked("prune", "--keep", "1", "--dry-run")["kept"]["1"] == "is champion"


def test_an_interrupted_deletion_is_completed(desk: Desk) -> None:
    delete_artifacts(desk.registry._client, desk.settings.registry.tracking_uri, f"aurora.{desk.line}", "1")
    assert desk.asked("prune", "--keep", "1")["deleted"] == ["1"]
