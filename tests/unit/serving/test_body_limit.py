"""Bodies above the limit are rejected before they are read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from api_node import MODEL, Node, running_node

from schemas.settings import Serve

LIMIT = 2048


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node(Serve(max_body_bytes=LIMIT)) as node:
        yield node


def body(size: int) -> bytes:
    """Return a request of ``size`` bytes, padded with spaces."""
    text = json.dumps({"model": MODEL, "prompt": "hello"}).encode()
    return text + b" " * (size - len(text))


def in_chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 100):
        yield data[start : start + 100]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/admin/speculator/pin"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_rejected_in_openais_shape(node: Node, path: str, chunked: bool) -> None:
    data = body(LIMIT + 1)
    answer = httpx.post(
        node.url + path,
        content=in_chunks(data) if chunked else data,
        headers={"content-type": "application/json"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (413, "request_too_large", "invalid_request_error")
    assert "serve.max_body_bytes" in error["message"]
    assert node.engine.requests == []
    assert node.metric("aurora_serve_requests_total", outcome="rejected") == 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_up_to_the_limit_is_read(node: Node, chunked: bool) -> None:
    data = body(LIMIT)
    answer = httpx.post(
        f"{node.url}/v1/completions",
        content=in_chunks(data) if chunked else data,
        headers={"content-type": "application/json"},
    )
    assert answer.json()["choices"][0]["text"] == "hello"


def test_a_declared_length_above_the_limit_is_rejected_before_the_body_arrives(node: Node) -> None:
    host, port = node.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n")
        answer = b""
        while received := connection.recv(4096):
            answer += received
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


def test_a_client_that_disconnects_during_its_body_starts_no_request(node: Node) -> None:
    host, port = node.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert node.complete("hello").choices[0].text == "hello"
    assert len(node.engine.requests) == 1
