"""Every captured row ends as published, dropped or pending, and the engine never waits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import structlog
from confluent_kafka import KafkaError
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import LogCapture
from trace_bench import ORIGIN, Bench, FakeProducer, a_verify_step, eventually

from schemas.settings import Kafka, SettingsError, Traces
from schemas.telemetry import trace_context
from schemas.trace.record import CONTENT_TYPE, FORMAT, SCHEMA_ID
from serving.engines.base import Request
from serving.traces.publisher import OVERDUE_S, connect


@pytest.fixture(autouse=True)
def fast_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the publisher read its queue more often, so that no test waits for it."""
    monkeypatch.setattr("serving.traces.publisher._PAUSE_S", 0.002)


def open_circuit_breaker(bench: Bench) -> None:
    bench.producer.mode = "hold"
    bench.send()
    bench.send()
    bench.settle()
    bench.now += OVERDUE_S
    eventually(lambda: bench.publisher.circuit_breaker == "open")


def test_a_finished_request_is_one_message_with_its_headers() -> None:
    bench = Bench()
    bench.send(verify_steps=4)
    counts = bench.publisher.close(1)
    (chunk,) = bench.producer.delivered
    assert [r.verify_step for r in chunk.verify_steps] == [0, 1, 2, 3]
    assert (chunk.envelope.last, chunk.envelope.finish) == (True, "stop")
    headers = dict(bench.producer.headers[0])
    published_by = trace_context.parse_traceparent(headers.pop("traceparent"))
    assert published_by is not None
    assert published_by.trace_id == trace_context.request_context(chunk.envelope.request).trace_id
    assert headers == {
        "content-type": CONTENT_TYPE.encode(),
        "format": FORMAT.encode(),
        "schema": SCHEMA_ID.encode(),
        "node": b"node-a",
        "target": b"t" * 32,
        "speculator": b"7",
        "rows": b"4",
    }
    assert (counts.captured, counts.published, counts.dropped, counts.pending) == (4, 4, {}, 0)


def test_rows_of_a_split_prompt_are_counted_as_published() -> None:
    bench = Bench()
    bench.send(tokens=5000)
    counts = bench.publisher.close(1)
    assert len(bench.producer.delivered) > 3
    assert counts.captured == counts.published == bench.producer.rows > 1


def test_a_cancelled_request_publishes_its_captured_rows() -> None:
    bench = Bench()
    request = Request("chatcmpl-1", (1,), 5)
    bench.publisher.record(request, (a_verify_step(0), a_verify_step(1)), None)
    bench.publisher.record(request, (), "cancelled")
    bench.publisher.close(1)
    (chunk,) = bench.producer.delivered
    assert (len(chunk.verify_steps), chunk.envelope.finish) == (2, "cancelled")


def test_a_request_that_opted_out_is_not_captured() -> None:
    bench = Bench()
    bench.publisher.record(Request("chatcmpl-1", (1,), 5, trace=False), (a_verify_step(0),), "stop")
    assert (bench.publisher.close(1).captured, bench.producer.delivered) == (0, [])


def test_rows_above_the_queue_limit_are_dropped_and_the_request_still_ends() -> None:
    bench = Bench(max_queue_bytes=1 << 20)
    bench.producer.mode = "hold"
    for _ in range(40):
        bench.send(tokens=3000)
    bench.settle()
    counts = bench.publisher.counts()
    assert counts.pending_bytes <= 1 << 20
    assert counts.dropped["queue_full"] > 0
    assert counts.captured == counts.published + counts.rows_dropped + counts.pending
    assert bench.publisher._builders == {}
    bench.producer.come_back()
    assert bench.publisher.close(1).pending == 0
    assert {c.envelope.request for c in bench.producer.delivered} >= {"chatcmpl-1", "chatcmpl-2"}


def test_chunks_wait_for_an_unreachable_broker_and_arrive_once() -> None:
    bench = Bench()
    open_circuit_breaker(bench)
    assert (bench.publisher.counts().pending, bench.publisher.counts().dropped) == (2, {})
    bench.producer.come_back()
    eventually(lambda: bench.publisher.circuit_breaker == "closed")
    bench.send()
    counts = bench.publisher.close(1)
    assert (counts.published, counts.dropped) == (3, {})
    assert [c.envelope.request for c in bench.producer.delivered] == ["chatcmpl-1", "chatcmpl-2", "chatcmpl-3"]


def test_an_open_circuit_breaker_drops_chunks_except_one_probe_per_interval() -> None:
    bench = Bench()
    open_circuit_breaker(bench)
    bench.send()
    eventually(lambda: bench.publisher.counts().dropped == {"circuit_breaker_open": 1})
    bench.now += 5
    bench.send()
    bench.settle()
    assert (len(bench.producer.held), bench.publisher.circuit_breaker) == (3, "half_open")
    bench.send()
    eventually(lambda: bench.publisher.counts().dropped == {"circuit_breaker_open": 2})
    bench.producer.come_back()
    counts = bench.publisher.close(1)
    assert (counts.published, counts.pending) == (3, 0)


def test_rejected_chunks_are_dropped_and_open_the_circuit_breaker() -> None:
    bench = Bench()
    bench.producer.mode = "refuse"
    bench.send()
    bench.send()
    eventually(lambda: bench.publisher.circuit_breaker == "open")
    assert bench.publisher.close(1).dropped == {"rejected": 2}


def test_too_large_chunks_do_not_open_the_circuit_breaker() -> None:
    bench = Bench()
    bench.producer.mode = "large"
    for _ in range(5):
        bench.send()
    assert bench.publisher.close(1).dropped == {"too_large": 5}
    assert bench.publisher.circuit_breaker == "closed"


def test_chunks_in_flight_when_the_node_closes_are_unconfirmed() -> None:
    bench = Bench()
    bench.producer.mode = "hold"
    bench.send(verify_steps=3)
    counts = bench.publisher.close(0.1)
    assert (counts.captured, counts.dropped, counts.pending, counts.pending_bytes) == (3, {"unconfirmed": 3}, 0, 0)


def test_rows_after_closing_are_dropped_and_counted() -> None:
    bench = Bench()
    bench.publisher.close(1)
    bench.send(verify_steps=2)
    counts = bench.publisher.counts()
    assert (counts.captured, counts.dropped, counts.pending) == (2, {"closed": 2}, 0)


def test_a_fatal_client_error_replaces_the_producer() -> None:
    bench = Bench()
    broken = bench.producer
    broken.mode = "hold"
    bench.send()
    bench.settle()
    bench.producers.append(FakeProducer())
    bench.on_error(KafkaError(KafkaError._FATAL, "fatal", fatal=True))
    eventually(lambda: bench.publisher.counts().dropped == {"unconfirmed": 1})
    bench.send()
    counts = bench.publisher.close(1)
    assert (counts.published, bench.producer.rows, broken.delivered) == (1, 1, [])


def test_denied_access_is_logged_once_with_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = LogCapture()
    # The module's own logger may be bound already to what another test has configured.
    monkeypatch.setattr("serving.traces.publisher.log", structlog.wrap_logger(None, processors=[captured]))
    bench = Bench()
    denial = KafkaError(KafkaError._AUTHENTICATION, "wrong password")
    for _ in range(3):
        bench.on_error(denial)
    bench.on_error(KafkaError(KafkaError._TRANSPORT, "away"))
    bench.send()
    bench.settle()
    bench.on_error(denial)
    bench.publisher.close(1)
    denied = [line for line in captured.entries if line["event"] == "trace_producer_denied"]
    assert [(line["why"], line["setting"]) for line in denied] == [("wrong password", "kafka.client_options")] * 2


def test_malformed_verify_steps_neither_raise_nor_end_the_publisher() -> None:
    bench = Bench()
    malformed = replace(a_verify_step(0), features=None)  # type: ignore[arg-type]
    bench.publisher.record(Request("bad", (1,), 5), (malformed,), "stop")
    unencodable = replace(a_verify_step(0), tokens=(2**40,), features=np.zeros((1, 6), np.uint16))
    bench.publisher.record(Request("worse", (1,), 5), (unencodable,), "stop")
    bench.send()
    counts = bench.publisher.close(1)
    assert (counts.captured, counts.published, counts.dropped, counts.pending) == (3, 1, {"unencodable": 2}, 0)


@settings(max_examples=60, deadline=None)
@given(
    way=st.sampled_from(
        [
            {},
            {"features": "recompute"},
            {"features": "claim-check", "claim_check_max_bytes": 1 << 16},
            {"max_bytes_per_second": 3_000},
            {"max_bytes_per_second": 3_000, "features": "claim-check"},
        ]
    ),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["ack", "hold", "refuse", "large", "full", "fatal", "back", "no store", "store"]),
            st.integers(1, 5),
            st.sampled_from([3, 2000]),
            st.floats(0, 12),
            st.booleans(),
        ),
        max_size=12,
    ),
)
def test_every_row_is_counted_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, way: dict[str, Any], steps: list[tuple[str, int, int, float, bool]]
) -> None:
    """Whenever the publisher takes its turn: here hypothesis decides it, not the machine."""
    folder = tmp_path_factory.mktemp("claims")
    bench = Bench(started=False, max_queue_bytes=1 << 20, claim_check_uri=str(folder / "claims"), **way)
    for mode, verify_steps, tokens, passes, publishes in steps:
        bench.now += passes
        match mode:
            case "back":
                bench.producer.come_back()
            case "no store":
                if folder.is_dir():
                    shutil.rmtree(folder)
                folder.touch()
            case "store" if folder.is_file():
                folder.unlink()
            case "store":
                pass
            case _:
                bench.producer.mode = mode
        bench.send(verify_steps, tokens if verify_steps == 1 else 3)
        if publishes:
            bench.publisher._take_turn()
        counts = bench.publisher.counts()
        assert counts.captured == counts.published + counts.rows_dropped + counts.pending
    bench.publisher.start(ORIGIN)
    counts = bench.publisher.close(0.1)
    assert counts.captured == counts.published + counts.rows_dropped
    assert counts.published == bench.producer.rows
    assert (counts.pending, counts.pending_bytes) == (0, 0)


def test_an_unknown_kafka_option_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(SettingsError, match=r"kafka\.client_options.*no\.such\.option"):
        connect(Kafka(client_options={"no.such.option": "1"}), Traces(), lambda _: None)
