"""Versions, tags, aliases and recorded moves, on a real MLflow server and a real broker."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource
from promoter_world import figures

from ops.demo.stack_monitor import read_versions
from pipeline.delta import DeltaLog
from schemas.events import AliasMoved
from schemas.settings import Kafka, Settings, load
from schemas.settings import Registry as RegistrySettings
from schemas.speculator import checkpoint
from schemas.speculator.network import DraftShape, random_draft
from trainer.release.audit import BrokerError, KafkaEvents
from trainer.release.promoter import Promoter
from trainer.release.registry import RegistryError, SpeculatorRegistry

SHAPE = DraftShape(8, 8, 2, 1, 4, 32, 16, 1e-6, 100.0, 64, (1, 2, 3))


@pytest.fixture
def versions(registry: str) -> SpeculatorRegistry:
    return SpeculatorRegistry(RegistrySettings(tracking_uri=registry))


@pytest.fixture
def target() -> str:
    return uuid.uuid4().hex


def register(
    versions: SpeculatorRegistry, folder: Path, target: str, seed: int, tags: dict[str, str]
) -> tuple[str, str]:
    """Line and number of a new version."""
    line = checkpoint.write_checkpoint(random_draft(SHAPE, seed), folder, target).line
    return line, versions.register(line, folder, tags, {"accepted_per_step": 0.25})


def test_a_downloaded_version_equals_the_registered_one(
    versions: SpeculatorRegistry, tmp_path: Path, target: str
) -> None:
    tags = {"line": "l", "parent": "day-0-head-0", "tables": json.dumps({"accepted": 7}), "label": "übung ✓"}
    line, first = register(versions, tmp_path / "first", target, 0, tags)
    _, second = register(versions, tmp_path / "second", target, 1, {})
    assert (first, second) == ("1", "2")
    assert versions.tags(line, first) == tags
    files = versions.download(line, first, tmp_path / "back")
    written = {p.name: p.read_bytes() for p in (tmp_path / "first").iterdir()}
    assert {p.name: p.read_bytes() for p in files.iterdir()} == written
    checkpoint.read_checkpoint(files, line)


def test_aliases_can_be_moved(versions: SpeculatorRegistry, tmp_path: Path, target: str) -> None:
    line, first = register(versions, tmp_path / "first", target, 0, {})
    _, second = register(versions, tmp_path / "second", target, 1, {})
    assert versions.aliases(line) == {}
    versions.set_alias(line, "champion", first)
    versions.set_alias(line, "candidate", second)
    versions.set_alias(line, "champion", second)
    assert versions.aliases(line) == {"champion": second, "candidate": second}
    assert {found.name: found.aliases for found in versions.lines()}[line] == versions.aliases(line)


def test_an_unregistered_line_has_no_aliases(versions: SpeculatorRegistry) -> None:
    assert versions.aliases("never-registered") == {}


def test_a_missing_version_is_a_registry_error(versions: SpeculatorRegistry, tmp_path: Path, target: str) -> None:
    line, _ = register(versions, tmp_path / "first", target, 0, {})
    with pytest.raises(RegistryError):
        versions.set_alias(line, "champion", "99")
    with pytest.raises(RegistryError):
        versions.download(line, "99", tmp_path / "back")


def test_an_unreachable_registry_is_an_error_within_seconds(free_port: Callable[[], int], tmp_path: Path) -> None:
    away = SpeculatorRegistry(RegistrySettings(tracking_uri=f"http://127.0.0.1:{free_port()}", timeout=2))
    with pytest.raises(RegistryError, match=r"registry\.tracking_uri http://127"):
        away.lines()
    with pytest.raises(RegistryError):
        away.register("line", tmp_path, {}, {})


@pytest.fixture
def settings(broker: str, registry: str, tmp_path: Path) -> Settings:
    flags = {
        "kafka.bootstrap_servers": broker,
        "kafka.speculators_topic": f"speculators-{uuid.uuid4().hex[:8]}",
        "registry.tracking_uri": registry,
        "tables.uri": str(tmp_path / "tables"),
    }
    return load(environ={}, flags=flags)


def promoter_of(settings: Settings) -> Promoter:
    tables, registry = DeltaLog(settings.tables), SpeculatorRegistry(settings.registry)
    return Promoter(settings, registry, tables, KafkaEvents(settings.kafka))


def events(kafka: Kafka, line: str) -> list[AliasMoved]:
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": uuid.uuid4().hex})
    partition = TopicPartition(kafka.speculators_topic, 0, 0)
    consumer.assign([partition])
    _, end = consumer.get_watermark_offsets(partition, timeout=20)
    found = []
    while end and (message := consumer.poll(20)):
        moved = AliasMoved.model_validate_json(message.value() or b"")
        assert message.key() == moved.key.encode()
        if moved.line == line:
            found.append(moved)
        if message.offset() == end - 1:
            break
    consumer.close()
    return found


def test_a_promotion_appears_in_registry_table_and_topic(
    settings: Settings, versions: SpeculatorRegistry, tmp_path: Path, target: str
) -> None:
    promoter = promoter_of(settings)
    line, first = register(versions, tmp_path / "first", target, 0, figures(0.3, "day-0-head-0", 0.0))
    versions.set_alias(line, "candidate", first)
    promoter.poll()
    _, second = register(versions, tmp_path / "second", target, 1, figures(0.5, first, 0.3))
    versions.set_alias(line, "candidate", second)
    promoter.poll()
    assert promoter.status().error is None
    assert versions.aliases(line) == {"candidate": second, "champion": second, "previous": first}

    rows = [row for row in DeltaLog(settings.tables).read_in_order("promotions").to_pylist() if row["line"] == line]
    assert [(r["alias"], r["from_version"], r["to_version"]) for r in rows] == [
        ("candidate", None, first),
        ("champion", None, first),
        ("candidate", first, second),
        ("champion", first, second),
        ("previous", None, first),
    ]
    registered, promoted = read_versions(settings, line)
    assert [version.number for version in registered] == [move.to_version for move in promoted] == [first, second]
    sent = events(settings.kafka, line)
    assert sorted((e.alias, e.to_version or "") for e in sent) == sorted((r["alias"], r["to_version"]) for r in rows)
    promoted = next(e for e in sent if e.key == f"{line}/champion" and e.to_version == second)
    assert (promoted.actor, promoted.figures["accepted_per_step"]) == ("promoter", 0.5)

    admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers})
    resource = ConfigResource("topic", settings.kafka.speculators_topic)
    assert admin.describe_configs([resource])[resource].result(20)["cleanup.policy"].value == "compact"

    # A second process only sends the last moves again.
    again = promoter_of(settings)
    again.poll()
    assert again.status().alias_moves == 0
    last = {e.key: e for e in sent}
    assert {e.key: e for e in events(settings.kafka, line)[len(sent) :]} == last


def test_an_unreachable_broker_is_a_broker_error(free_port: Callable[[], int]) -> None:
    away = KafkaEvents(Kafka(bootstrap_servers=f"127.0.0.1:{free_port()}"))
    with pytest.raises(BrokerError, match=r"kafka\.bootstrap_servers"):
        away.send("line/champion", b"{}")
