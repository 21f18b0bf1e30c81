"""Parts of the stack, from the settings."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ops.local import parts
from ops.local.kafka import JarsError, read_jar_hashes, verify_jars
from ops.local.parts import (
    Part,
    PortInUseError,
    check_ports,
    embeds_broker,
    embeds_registry,
    plan_stack,
    resolve_addresses,
)
from ops.local.process import Process
from schemas.settings import Settings, load


def settings(**flags: object) -> Settings:
    return load(environ={}, flags={name.replace("__", "."): value for name, value in flags.items()})


def test_default_addresses_are_embedded_on_the_ports_of_the_stack() -> None:
    given = settings(stack__kafka_port=30001, stack__mlflow_port=30002)
    assert embeds_broker(given)
    assert embeds_registry(given)
    assert resolve_addresses(given).kafka.bootstrap_servers == "127.0.0.1:30001"
    assert resolve_addresses(given).registry.tracking_uri == "http://127.0.0.1:30002"


def test_addresses_that_name_the_embedded_ports_are_embedded() -> None:
    given = settings(kafka__bootstrap_servers="127.0.0.1:19092", registry__tracking_uri="http://127.0.0.1:15000/")
    assert embeds_broker(given)
    assert embeds_registry(given)


def test_custom_addresses_of_broker_and_registry_are_kept() -> None:
    given = settings(kafka__bootstrap_servers="kafka:9092", registry__tracking_uri="https://mlflow.example")
    assert resolve_addresses(given) == given
    assert [part.name for part in plan_stack(given).parts] == ["stream", "train", "promoter", "serve"]
    assert all(part.after == () for part in plan_stack(given).parts)


def test_every_part_reads_the_same_settings() -> None:
    given = settings(
        kafka__bootstrap_servers="kafka:9092", registry__tracking_uri="https://mlflow.example", serve__node="here"
    )
    for part in plan_stack(given).parts:
        assert load(environ=part.process.environ) == given


def test_training_runs_at_lower_priority() -> None:
    given = settings(kafka__bootstrap_servers="kafka:9092")
    nice = {part.name: part.process.nice for part in plan_stack(given).parts}
    assert nice == {"registry": 10, "stream": 0, "train": 10, "promoter": 10, "serve": 0}


def test_a_port_in_use_names_its_setting(free_port: Callable[[], int], tmp_path: Path) -> None:
    port = free_port()
    part = Part("serve", Process("serve", ["true"], tmp_path / "log"), lambda: True, ports={"serve.port": port})
    check_ports((part,))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(PortInUseError, match=rf"serve needs port {port}.*set serve\.port"):
            check_ports((part,))


def test_an_unreachable_address_does_not_answer(free_port: Callable[[], int]) -> None:
    assert not parts.is_answering(f"http://127.0.0.1:{free_port()}/status")


def test_an_altered_or_missing_jar_is_rejected(tmp_path: Path) -> None:
    jar = tmp_path / "a.jar"
    jar.write_bytes(b"x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    verify_jars([jar], {"a.jar": digest})
    for expected in ({"a.jar": "0" * 64}, {}, {"a.jar": digest, "b.jar": digest}):
        with pytest.raises(JarsError, match=r"[ab]\.jar"):
            verify_jars([jar], expected)


def test_the_recorded_jars_are_those_of_the_broker() -> None:
    assert "kafka_2.13-4.4.0.jar" in read_jar_hashes()
    assert all(len(digest) == 64 for digest in read_jar_hashes().values())
