"""Tests of the consumer: its options and credentials, its Faust app, and its buffer."""

from __future__ import annotations

import asyncio
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.consumer import (
    RecordBuffer,
    buffer_bytes,
    build_credentials,
    create_app,
    find_ignored_options,
    flush_interval_s,
)
from schemas.settings import Kafka, Settings, SettingsError, Stream, Tables

SOON_S = 0.001
LONG_S = 600.0
PASSWORD = {"sasl.username": "aurora", "sasl.password": "geheim"}


def test_connection_is_plaintext_without_options() -> None:
    assert build_credentials({}) is None
    assert build_credentials({"security.protocol": "plaintext"}) is None


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("name", ["sasl.mechanism", "sasl.mechanisms"])
def test_sasl_credentials_support_every_mechanism(name: str, mechanism: str) -> None:
    credentials = build_credentials({"security.protocol": "SASL_PLAINTEXT", name: mechanism, **PASSWORD})
    assert (credentials.username, credentials.password, credentials.mechanism.value) == ("aurora", "geheim", mechanism)
    assert credentials.ssl_context is None


def test_tls_verifies_the_host_name_unless_disabled() -> None:
    strict = build_credentials({"security.protocol": "SSL"}).context
    assert (strict.check_hostname, strict.verify_mode) == (True, ssl.CERT_REQUIRED)
    any_name = build_credentials({"security.protocol": "SSL", "ssl.endpoint.identification.algorithm": "none"}).context
    assert (any_name.check_hostname, any_name.verify_mode) == (False, ssl.CERT_REQUIRED)
    blind = build_credentials({"security.protocol": "SSL", "enable.ssl.certificate.verification": "false"}).context
    assert (blind.check_hostname, blind.verify_mode) == (False, ssl.CERT_NONE)


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ({"security.protocol": "TLS"}, "security.protocol 'TLS'"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}, "sasl.mechanism 'OAUTHBEARER'"),
        ({"security.protocol": "SSL", "ssl.ca.location": "/nowhere.pem"}, r"ssl\.ca\.location /nowhere\.pem"),
        ({"security.protocol": "SSL", "ssl.ca.pem": "no certificate"}, "kafka.client_options"),
    ],
)
def test_invalid_option_names_its_setting(client: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_credentials(client)


def test_unsupported_options_are_ignored_except_security_options() -> None:
    assert find_ignored_options({"security.protocol": "SSL", "socket.timeout.ms": "1"}) == ["socket.timeout.ms"]
    with pytest.raises(
        SettingsError, match=r"kafka\.client_options: ssl\.certificate\.pem: .*ssl\.certificate\.location"
    ):
        find_ignored_options({"security.protocol": "SSL", "ssl.certificate.pem": "-"})


@pytest.mark.parametrize("largest", [10_000, 1_000_000, 64 << 20])
def test_faust_buffers_no_more_bytes_than_the_limit_or_one_message(largest: int) -> None:
    stream = Stream(flush_bytes=1 << 20)
    conf = create_app(Settings(kafka=Kafka(max_message_bytes=largest), stream=stream)).conf
    assert conf.stream_buffer_maxsize * largest <= max(buffer_bytes(stream), largest)
    assert conf.broker_max_poll_records * largest <= max(buffer_bytes(stream), largest)


def test_commits_to_an_object_store_are_less_frequent_by_default() -> None:
    def interval(uri: str, **stream: float) -> float:
        return flush_interval_s(Settings(tables=Tables(uri=uri), stream=Stream(**stream)))

    assert (interval("/tables"), interval("s3://bucket/tables")) == (1, 10)
    assert interval("s3://bucket/tables", flush_interval=0.5) == 0.5


def test_worker_that_reads_nothing_for_days_stays_in_its_group() -> None:
    assert create_app(Settings()).conf.broker_max_poll_interval > 30 * 86400


def test_no_session_timeout_is_longer_than_a_request_may_take_which_faust_refuses() -> None:
    for timeout in (10.0, 60.0):
        conf = create_app(Settings(stream=Stream(session_timeout=timeout, static_member="worker-0"))).conf
        assert conf.broker_request_timeout >= conf.broker_session_timeout == timeout
        assert conf.consumer_group_instance_id == "worker-0"


def create_buffer(linger_s: float = SOON_S) -> RecordBuffer[int]:
    return RecordBuffer(batch_records=4, batch_bytes=100, linger_s=linger_s, max_bytes=200)


async def fill(into: RecordBuffer[int], sizes: list[int]) -> None:
    for number, size in enumerate(sizes):
        await into.put(number, size)


@given(st.lists(st.integers(1, 250), max_size=30))
def test_buffer_returns_each_item_once_in_order_within_its_limit(sizes: list[int]) -> None:
    async def scenario() -> None:
        buffer = create_buffer()
        filling = asyncio.create_task(fill(buffer, sizes))
        returned: list[int] = []
        while len(returned) < len(sizes):
            batch = await buffer.take_batch()
            assert 0 < len(batch) <= 4
            assert sum(sizes[i] for i in batch[:-1]) < 100, "a batch ends with the item that fills it"
            assert buffer.bytes <= max(200, *sizes)
            returned += batch
        assert returned == list(range(len(sizes)))
        assert buffer.bytes == 0
        await filling

    asyncio.run(scenario())


def test_full_batch_does_not_linger() -> None:
    async def scenario() -> None:
        by_number, by_size = create_buffer(linger_s=LONG_S), create_buffer(linger_s=LONG_S)
        await fill(by_number, [1, 1, 1, 1])
        await fill(by_size, [60, 60])
        assert await by_number.take_batch() == [0, 1, 2, 3]
        assert await by_size.take_batch() == [0, 1]

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_put_waits_while_the_buffer_is_full() -> None:
    async def scenario() -> None:
        buffer = create_buffer(linger_s=LONG_S)
        filling = asyncio.create_task(fill(buffer, [90, 90, 90]))
        await asyncio.sleep(0)
        assert buffer.bytes == 180
        assert not filling.done()
        assert await buffer.take_batch() == [0, 1]
        await filling
        assert buffer.bytes == 90

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_item_larger_than_the_limit_is_a_batch_of_its_own() -> None:
    async def scenario() -> None:
        buffer = create_buffer()
        await buffer.put(0, 1_000)
        assert buffer.full
        assert await buffer.take_batch() == [0]

    asyncio.run(scenario())
