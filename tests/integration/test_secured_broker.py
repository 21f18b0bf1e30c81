"""TLS and SASL on a real broker: ``kafka.client_options`` works for every client, and wrong options are errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import KafkaError
from secured_broker import Secured, secured_broker
from stream_worker import CHECKOUT, Publisher, chunk, rows_of_records, stream_settings, wait_until, worker

from pipeline import consumer, topics
from pipeline.broker import BrokerUnreachableError, TopicError, Watermarks
from pipeline.delta import DeltaLog
from pipeline.offsets import SourcePartition
from schemas.settings import Kafka, Settings, Traces, to_environ
from schemas.telemetry.trace_context import request_context
from schemas.trace.record import encode
from serving.traces.chunks import message_headers
from serving.traces.publisher import connect

SCRAM = "SCRAM-SHA-256"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Secured]:
    with secured_broker(tmp_path_factory.mktemp("secured"), free_port) as made:
        yield made


def settings_for(kafka: Kafka, folder: Path, port: int) -> Settings:
    made = stream_settings(kafka.bootstrap_servers, folder, port)
    return made.model_copy(update={"kafka": made.kafka.model_copy(update={"client_options": kafka.client_options})})


def without(kafka: Kafka, *names: str, **others: str) -> Kafka:
    kept = {name: value for name, value in kafka.client_options.items() if name not in names}
    return kafka.model_copy(
        update={"client_options": {**kept, **{name.replace("_", "."): text for name, text in others.items()}}}
    )


def test_both_clients_connect_with_every_supported_mechanism(secured: Secured) -> None:
    ways = [secured.by_password("PLAIN"), secured.by_password(SCRAM), secured.by_certificate()]
    inline = without(secured.by_password(SCRAM), "ssl.ca.location", ssl_ca_pem=Path(secured.ca).read_text())
    for kafka in [*ways, inline]:
        topics.compare(kafka)
        consumer.check_connection(kafka)


def test_node_and_worker_write_records_with_the_same_options(
    secured: Secured, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    settings = settings_for(secured.by_password(SCRAM), tmp_path, free_port())
    topics.create(settings.kafka)
    producer = connect(settings.kafka, Traces(), lambda _: None)
    for number in range(5):
        made = chunk(number, np.random.default_rng(number))
        producer.produce(
            settings.kafka.traces_topic,
            value=encode(made),
            key=made.envelope.request.encode(),
            headers=message_headers(made, request_context(made.envelope.request)),
            on_delivery=lambda error, _: pytest.fail(error.str()) if error else None,
        )
    assert producer.flush(20) == 0
    Publisher(settings).send_many(range(5, 8))
    tables, log = DeltaLog(settings.tables), tmp_path / "worker.log"
    with worker(settings, log):
        assert wait_until(lambda: rows_of_records(tables) == 8, 40), log.read_text()[-5_000:]
    assert tables.row_count("dead_letters") == 0


@pytest.mark.parametrize("mechanism", ["PLAIN", SCRAM])
def test_wrong_password_names_the_setting_in_both_clients(secured: Secured, mechanism: str) -> None:
    wrong = secured.by_password(mechanism, "falsch")
    for connect_once in (topics.create, consumer.check_connection):
        with pytest.raises(TopicError, match=r"check kafka\.client_options") as raised:
            connect_once(wrong)
        assert "uthentication" in str(raised.value)
        assert "falsch" not in str(raised.value)


def test_stream_worker_with_a_wrong_password_exits_with_one_line(secured: Secured, tmp_path: Path) -> None:
    settings = settings_for(secured.by_password(SCRAM, "falsch"), tmp_path, 0)
    ended = subprocess.run(
        [sys.executable, "-m", "ops.cli.main", "stream"],
        env={**os.environ, **to_environ(settings)},
        cwd=CHECKOUT,
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "kafka.client_options" in ended.stderr


def test_watermarks_report_an_authentication_error(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.broker.WATERMARK_TIMEOUT_S", 3.0)
    watermarks = Watermarks(secured.by_password(SCRAM, "falsch"))
    with pytest.raises(BrokerUnreachableError, match=r"uthentication.*kafka\.client_options"):
        watermarks.read([SourcePartition("traces", 0)])


def test_node_receives_the_authentication_error(secured: Secured) -> None:
    errors: list[KafkaError] = []
    producer = connect(secured.by_password("PLAIN", "falsch"), Traces(), errors.append)

    def is_rejected() -> bool:
        producer.poll(0.1)
        return any(error.code() == KafkaError._AUTHENTICATION for error in errors)

    assert wait_until(is_rejected, 20)


def test_unknown_certificate_names_the_setting(secured: Secured) -> None:
    unknown = without(secured.by_password(SCRAM), "ssl.ca.location")
    for connect_once in (topics.create, consumer.check_connection):
        with pytest.raises(TopicError, match=r"(?s)certificate.*kafka\.client_options"):
            connect_once(unknown)
