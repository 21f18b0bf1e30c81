"""Tests of claim checks: features are read back bit for bit, and failures of the store are errors with a setting."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_bench import Bench, a_verify_step, eventually

from pipeline.batches import Record, build
from schemas.claim_store import ClaimStore, ClaimStoreError
from schemas.settings import SettingsError, Traces
from schemas.trace.decoder import decode
from schemas.trace.record import U16, Claim, TraceError
from serving.engines.base import Request
from serving.traces.sampling import BURST_S

TIME_US = 1_700_000_000_000_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the publisher check for verify steps more often, so that no test waits for it."""
    monkeypatch.setattr("serving.traces.publisher._PAUSE_S", 0.002)


def features(tokens: int, width: int, seed: int = 0) -> U16:
    return np.random.default_rng(seed).integers(0, 2**16, (tokens, width)).astype(np.uint16)


def store(uri: object, **options: str) -> ClaimStore:
    return ClaimStore(Traces(claim_check_uri=str(uri), claim_check_options=options))


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(1, 50), width=st.integers(1, 40), seed=st.integers(0, 9))
def test_features_are_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, width: int, seed: int
) -> None:
    claims = store(tmp_path_factory.getbasetemp() / "claims")
    stored = features(tokens, width, seed)
    claim = claims.put(stored, TIME_US)
    np.testing.assert_array_equal(claims.get(claim, tokens, width), stored)
    for wrong in ((tokens + 1, width), (tokens, width + 1)):
        with pytest.raises(TraceError) as error:
            claims.get(claim, *wrong)
        assert error.value.reason == "claim_corrupt"


def test_file_is_named_by_its_checksum_in_a_folder_for_its_day(tmp_path: Path) -> None:
    claims = store(tmp_path)
    claim = claims.put(features(3, 4), TIME_US)
    assert claim.uri == f"{tmp_path.as_uri()}/2023-11-14/{claim.checksum}.arrow"
    assert Path(urlsplit(claim.uri).path).stat().st_size == claim.size
    assert claims.put(features(3, 4), TIME_US) == claim


@pytest.mark.parametrize("name", ["../secret.arrow", "2023-11-14/../../secret.arrow"])
def test_files_outside_the_store_are_rejected(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"x")
    for uri in (f"{(tmp_path / 'claims').as_uri()}/{name}", (tmp_path / "secret.arrow").as_uri(), "s3://other/x.arrow"):
        with pytest.raises(TraceError, match=r"traces\.claim_check_uri") as error:
            store(tmp_path / "claims").get(Claim(uri, "0" * 32, 1), 1, 1)
        assert error.value.reason == "claim_foreign"


def test_missing_folder_is_an_unreachable_store_and_not_a_missing_file(tmp_path: Path) -> None:
    claims = store(tmp_path / "claims")
    claim = claims.put(features(1, 1), TIME_US)
    (tmp_path / "claims").rename(tmp_path / "elsewhere")
    with pytest.raises(ClaimStoreError, match=r"traces\.claim_check_uri"):
        claims.get(claim, 1, 1)
    (tmp_path / "claims").mkdir()
    with pytest.raises(TraceError) as error:
        claims.get(claim, 1, 1)
    assert error.value.reason == "claim_missing"


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("claims", {"region": "x"}),
        ("s3://bucket/claims", {"no_such_option": "x"}),
        ("nowhere://bucket/claims", {}),
    ],
)
def test_invalid_address_or_option_names_its_setting(uri: str, options: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"traces\.claim_check_(uri|options)"):
        store(uri, **options)


def unchunked(stream: IO[bytes]) -> bytes:
    body = b""
    while size := int(stream.readline().split(b";")[0], 16):
        body += stream.read(size)
        stream.readline()
    while stream.readline().strip():
        pass
    return body


class Bucket(BaseHTTPRequestHandler):
    """The part of S3 that writes and reads objects."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        # The client sends its own chunks and a checksum inside HTTP chunks.
        body = unchunked(io.BytesIO(unchunked(self.rfile)))
        assert len(body) == int(self.headers["x-amz-decoded-content-length"])
        self.objects[self._key] = body
        self._answer(200, {"ETag": '"0"'})

    def do_HEAD(self) -> None:
        known = self.objects.get(self._key)
        if known is None:
            self._answer(200 if self._key.count("/") == 1 else 404, {})
        else:
            self._answer(200, {"content-length": str(len(known)), "ETag": '"0"'})

    def do_GET(self) -> None:
        start, end = self.headers["range"].removeprefix("bytes=").split("-")
        self._answer(206, {}, self.objects[self._key][int(start) : int(end) + 1])

    def log_message(self, *_: object) -> None:
        pass

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _answer(self, code: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(code)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def bucket() -> Iterator[dict[str, Any]]:
    """Start an S3 server and return its options and objects."""
    Bucket.objects = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    keys = {"access_key": "a", "secret_key": "s", "region": "x", "scheme": "http"}
    yield {"options": {**keys, "endpoint_override": f"127.0.0.1:{server.server_port}"}, "objects": Bucket.objects}
    server.shutdown()
    server.server_close()


def test_s3_prefix_is_a_claim_store(bucket: dict[str, Any]) -> None:
    claims = store("s3://traces/aurora/claims/", **bucket["options"])
    stored = features(5, 7)
    claim = claims.put(stored, TIME_US)
    assert claim.uri == f"s3://traces/aurora/claims/2023-11-14/{claim.checksum}.arrow"
    assert list(bucket["objects"]) == [f"/{claim.uri.removeprefix('s3://')}"]
    np.testing.assert_array_equal(claims.get(claim, 5, 7), stored)
    bucket["objects"].clear()
    with pytest.raises(TraceError) as error:
        claims.get(claim, 5, 7)
    assert error.value.reason == "claim_missing"


def test_unreachable_s3_store_is_not_a_missing_file(bucket: dict[str, Any], free_port: Any) -> None:
    unreachable = bucket["options"] | {"endpoint_override": f"127.0.0.1:{free_port()}"}
    claims = store("s3://traces/claims", **unreachable)
    with pytest.raises(ClaimStoreError, match=r"traces\.claim_check_uri"):
        claims.put(features(1, 1), TIME_US)
    with pytest.raises(ClaimStoreError):
        claims.get(Claim("s3://traces/claims/x.arrow", "0" * 32, 1), 1, 1)


def test_failing_store_opens_the_circuit_breaker_and_recovers(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("a file where the folder should be")
    bench = Bench(features="claim-check", claim_check_uri=str(tmp_path / "claims"))
    tried = _count_tries(bench)
    for _ in range(6):
        bench.send(verify_steps=2)
    bench.settle()
    counts = bench.publisher.counts()
    assert (counts.dropped, counts.pending, bench.producer.delivered) == ({"offload_failed": 12}, 0, [])
    assert len(tried) == 2, "after circuit_breaker_failures failures the store is left alone"
    assert bench.publisher.circuit_breaker == "closed", "it says nothing about the broker"
    (tmp_path / "claims").unlink()
    bench.send(verify_steps=2)
    bench.settle()
    assert bench.publisher.counts().dropped == {"offload_failed": 14}
    bench.now += 5
    bench.send(verify_steps=2)
    bench.send(verify_steps=2)
    counts = bench.publisher.close(1)
    assert (counts.published, counts.captured) == (4, 18)
    assert [len(r.features) for chunk in bench.producer.delivered for r in chunk.verify_steps] == [0] * 4


def _count_tries(bench: Bench) -> list[int]:
    assert bench.publisher._offload is not None
    claims, tried = bench.publisher._offload._store, list[int]()
    put = claims.put

    def counted(stored: U16, time_us: int) -> Claim:
        tried.append(len(stored))
        return put(stored, time_us)

    claims.put = counted  # type: ignore[method-assign]
    return tried


def test_nothing_is_written_to_the_store_while_the_broker_is_unreachable(tmp_path: Path) -> None:
    bench = Bench(features="claim-check", claim_check_uri=str(tmp_path))
    tried = _count_tries(bench)
    bench.producer.mode = "refuse"
    for _ in range(2):
        bench.send()
    eventually(lambda: bench.publisher.circuit_breaker == "open")
    for _ in range(5):
        bench.send()
    assert bench.publisher.close(1).dropped == {"rejected": 2, "circuit_breaker_open": 5}
    assert len(tried) == 2


def test_byte_budget_includes_the_files(tmp_path: Path) -> None:
    bench = Bench(
        features="claim-check", claim_check_uri=str(tmp_path), claim_check_max_bytes=1 << 16, max_bytes_per_second=1_000
    )
    for number in range(100):
        stored = replace(a_verify_step(0, tokens=300), features=features(300, 6, number))
        bench.publisher.record(Request(f"chatcmpl-{number}", (1,), 5), (stored,), "stop")
    bench.settle()
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.arrow"))
    messages = sum(map(len, bench.producer.values))
    assert 0 < messages + files <= max(1_000 * BURST_S, 20_000 + (1 << 16))
    counts = bench.publisher.close(1)
    assert (counts.published, counts.dropped) == (100, {})
    assert 0 < counts.without_features < 100
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.arrow")) == files, "no file without features"


def test_reader_finds_the_features_that_a_publisher_offloads(tmp_path: Path) -> None:
    bench = Bench(features="claim-check", claim_check_uri=str(tmp_path))
    bench.send(verify_steps=3)
    bench.publisher.close(1)
    ((value,), (headers,)) = bench.producer.values, bench.producer.headers
    claim = decode(value).envelope.claim
    assert claim is not None
    assert dict(headers)["claim-bytes"] == str(claim.size).encode()
    record = Record("t", 0, 0, 0, b"k", value, tuple(headers))
    built = build([record], 32, store(tmp_path).get)
    assert (built.dead_letters, built.rows["accepted"]["tokens"].to_pylist()[0][:3]) == ({}, [0, 1, 2])
