"""``aurora doctor`` reports no problem on a sound deployment, and a fix for each planted fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from answering import answering, status_of_node
from span_collector import collecting
from trainer_world import World, write_target
from typer.testing import CliRunner

from ops.cli.main import app
from ops.observe.doctor import host
from ops.observe.doctor.checks import Finding, run_checks
from pipeline import topics
from schemas.settings import Settings, load
from schemas.speculator import checkpoint
from trainer.data.target import read_target
from trainer.release.registry import SpeculatorRegistry


class Stand(NamedTuple):
    """A sound deployment whose processes do not run."""

    flags: dict[str, Any]
    folder: Path

    def settings(self, **changed: Any) -> Settings:
        return load(environ={}, flags=self.flags | {name.replace("__", "."): value for name, value in changed.items()})


@pytest.fixture(scope="module")
def stand(broker: str, registry: str, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Stand:
    folder = tmp_path_factory.mktemp("doctor")
    write_target(folder / "target")
    (folder / "target" / "tokenizer.json").write_text("{}")
    flags: dict[str, Any] = {
        "kafka.bootstrap_servers": broker,
        "kafka.traces_topic": "doctor.traces",
        "kafka.speculators_topic": "doctor.speculators",
        "kafka.drift_topic": "doctor.drift",
        "kafka.lag_topic": "doctor.lag",
        "registry.tracking_uri": registry,
        "target.path": str(folder / "target"),
        "speculator.draft_vocab_size": 32,
        "serve.max_model_len": 256,
        "tables.uri": str(folder / "tables"),
        "traces.features": "claim-check",
        "traces.claim_check_uri": str(folder / "claims"),
        **{f"{name}.port": free_port() for name in ("serve", "stream", "train", "promoter")},
        **{name: str(folder) for name in ("stack.data_dir", "stream.data_dir", "train.checkpoint_dir")},
    }
    stand = Stand(flags, folder)
    settings = stand.settings()
    topics.create(settings.kafka)
    World(settings).serve(3)
    target = read_target(settings)
    checkpoint.write_checkpoint(target.day_0, folder / "version", target.fingerprint)
    SpeculatorRegistry(settings.registry).register(target.line, folder / "version", {}, {})
    return stand


def problems(settings: Settings) -> list[Finding]:
    return [finding for finding in run_checks(settings) if finding.level == "problem"]


def only_problem(settings: Settings) -> Finding:
    (found,) = problems(settings)
    return found


def warnings(settings: Settings, about: str) -> list[Finding]:
    return [finding for finding in run_checks(settings) if (finding.level, finding.about) == ("warning", about)]


def test_a_sound_deployment_has_no_problems(stand: Stand) -> None:
    found = list(run_checks(stand.settings()))
    line = read_target(stand.settings()).line
    assert [one for one in found if one.level == "problem"] == []
    well = {one.about for one in found if one.level == "ok"}
    assert {"target", "folders", "broker", "topics", "registry", "tables", "claims", "clock"} <= well
    assert [one.found for one in found if one.about == "registry"][-1].startswith(f"line {line}")
    assert {one.about for one in found if one.level == "warning"} == {"serve", "stream", "train", "promoter"}


def test_an_unreachable_broker_is_a_problem(stand: Stand, free_port: Callable[[], int]) -> None:
    finding = only_problem(stand.settings(kafka__bootstrap_servers=f"127.0.0.1:{free_port()}"))
    assert finding.about == "broker"
    assert "kafka.bootstrap_servers" in finding.fix


def test_a_too_small_message_limit_is_a_problem(stand: Stand) -> None:
    finding = only_problem(stand.settings(kafka__max_message_bytes=2_000_000))
    assert "max.message.bytes is 1016384" in finding.found
    assert "aurora topics apply" in finding.fix


def test_more_partitions_than_configured_are_a_problem(stand: Stand) -> None:
    finding = only_problem(stand.settings(kafka__partitions=1))
    assert "set kafka.partitions = 2" in finding.fix


def test_a_replication_factor_above_the_brokers_is_a_problem(stand: Stand) -> None:
    found = problems(stand.settings(kafka__replication_factor=3))
    assert any("the cluster has 1" in one.found and "kafka.replication_factor to 1" in one.fix for one in found)


def test_a_missing_topic_is_a_warning(stand: Stand) -> None:
    (finding,) = warnings(stand.settings(kafka__traces_topic="doctor.other"), "topics")
    assert finding.found == "doctor.other does not exist"


def test_an_unreachable_registry_is_a_problem(stand: Stand, free_port: Callable[[], int]) -> None:
    finding = only_problem(stand.settings(registry__tracking_uri=f"http://127.0.0.1:{free_port()}"))
    assert finding.about == "registry"
    assert "registry.tracking_uri" in finding.fix


def test_another_server_at_the_registry_address_is_a_problem(stand: Stand) -> None:
    with answering(404, b"not here") as uri:
        finding = only_problem(stand.settings(registry__tracking_uri=uri))
    assert "something else than MLflow" in finding.found


def test_rejected_registry_credentials_are_a_problem(stand: Stand) -> None:
    with answering(401, b"") as uri:
        finding = only_problem(stand.settings(registry__tracking_uri=uri))
    assert "registry.username" in finding.fix


def test_an_unusable_span_collector_is_a_warning(stand: Stand, free_port: Callable[[], int]) -> None:
    with collecting() as collector:
        assert not warnings(stand.settings(telemetry__endpoint=collector.url), "tracing")
    with answering(404, b"") as uri:
        (finding,) = warnings(stand.settings(telemetry__endpoint=uri), "tracing")
        assert "to an empty export" in finding.found
    (finding,) = warnings(stand.settings(telemetry__endpoint=f"http://127.0.0.1:{free_port()}"), "tracing")
    assert "telemetry.endpoint" in finding.fix


def test_a_draft_vocabulary_of_another_line_is_a_warning(stand: Stand) -> None:
    settings = stand.settings(speculator__draft_vocab_size=24)
    (in_registry,) = warnings(settings, "registry")
    (in_tables,) = warnings(settings, "tables")
    assert f"no version of line {read_target(settings).line}" in in_registry.found
    assert "no samples of line" in in_tables.found


def test_a_target_folder_without_a_model_is_a_problem(stand: Stand, tmp_path: Path) -> None:
    finding = only_problem(stand.settings(target__path=str(tmp_path)))
    assert "target.path" in finding.fix


def test_a_target_without_a_tokenizer_is_a_problem(stand: Stand, tmp_path: Path) -> None:
    shutil.copytree(stand.folder / "target", tmp_path / "target", ignore=shutil.ignore_patterns("tokenizer.json"))
    assert "no tokenizer" in only_problem(stand.settings(target__path=str(tmp_path / "target"))).found


def test_a_max_model_len_above_the_targets_context_is_a_problem(stand: Stand) -> None:
    finding = only_problem(stand.settings(serve__max_model_len=1000))
    assert finding.fix == "set serve.max_model_len to 256 or less"


def test_a_missing_vocabulary_file_is_a_problem(stand: Stand, tmp_path: Path) -> None:
    finding = only_problem(stand.settings(speculator__draft_vocab_file=str(tmp_path / "ids.json")))
    assert "speculator.draft_vocab_file" in finding.fix


def test_a_file_in_place_of_a_folder_is_a_problem(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "train").write_text("")
    finding = only_problem(stand.settings(train__checkpoint_dir=str(tmp_path / "train" / "checkpoints")))
    assert finding.about == "folders"
    assert "set train.checkpoint_dir" in finding.fix


def test_a_full_disk_is_a_problem(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(stand.folder)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _: usage._replace(free=host.MIN_FREE - 1))
    found = problems(stand.settings())
    assert {one.about for one in found} == {"folders"}
    assert any("tables.uri" in one.fix for one in found)


def test_a_wrong_clock_is_a_problem(stand: Stand) -> None:
    with answering(200, b"3.14.0", date="Sun, 06 Nov 1994 08:49:37 GMT") as uri:
        found = problems(stand.settings(registry__tracking_uri=uri))
    assert any(one.about == "clock" and "NTP" in one.fix for one in found)


def test_an_unusable_claim_check_store_is_a_problem(stand: Stand, tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("")
    found = problems(stand.settings(traces__claim_check_uri=str(tmp_path / "claims")))
    assert {one.about for one in found} == {"folders", "claims"}
    assert all("traces.claim_check_uri" in one.fix for one in found)


def test_local_tables_with_a_remote_broker_are_a_warning(stand: Stand) -> None:
    (finding,) = warnings(stand.settings(kafka__bootstrap_servers="no-such-broker.invalid:9092"), "tables")
    assert "no-such-broker.invalid" in finding.found


def test_a_node_of_another_line_is_a_problem(stand: Stand) -> None:
    target = read_target(stand.settings())
    with answering(200, status_of_node(target.fingerprint, "other-line").encode()) as uri:
        finding = only_problem(stand.settings(serve__port=uri.rpartition(":")[2]))
    assert f"is of line other-line, the settings give {target.line}" in finding.found


def test_another_program_on_a_configured_port_is_a_problem(stand: Stand) -> None:
    with answering(200, b"hello") as uri:
        finding = only_problem(stand.settings(promoter__port=uri.rpartition(":")[2]))
    assert "set promoter.port" in finding.fix


def test_an_open_host_is_a_warning(stand: Stand) -> None:
    (finding,) = warnings(stand.settings(train__host="0.0.0.0"), "exposure")
    assert "train.host" in finding.fix


def test_the_command_prints_json_and_exits_1_on_a_problem(stand: Stand, free_port: Callable[[], int]) -> None:
    flags = [part for name, value in stand.flags.items() for part in ("--set", f"{name}={value}")]
    well = CliRunner().invoke(app, ["doctor", "--json", *flags])
    assert well.exit_code == 0, well.output
    assert {"about", "level", "found", "fix"} == json.loads(well.stdout)["findings"][0].keys()
    ill = CliRunner().invoke(app, ["doctor", *flags, "--set", f"registry.tracking_uri=http://127.0.0.1:{free_port()}"])
    assert ill.exit_code == 1
    assert "1 to fix" in ill.stderr
