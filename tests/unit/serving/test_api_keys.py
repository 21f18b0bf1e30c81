"""API keys of ``/v1``: who gets an answer, and how keys change while the node runs."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import openai
import pytest
from api_node import MODEL, Node, running_node

from ops.loadgen.load import Load, Prompt, chat_request, read_api_key, read_model_name
from schemas.settings import Serve, SettingsError, load
from serving.http.tokens import TokenFile, is_authorized


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# of team a\nkey-a\n  schlüssel-b\n")
    return path


def status(node: Node, authorization: str | None, path: str = "/v1/models") -> int:
    headers = {} if authorization is None else {b"authorization": authorization.encode()}
    return httpx.get(node.url + path, headers=headers).status_code


def test_each_key_of_the_file_gives_access_and_nothing_else_does(file: Path) -> None:
    with running_node(Serve(api_keys_file=str(file))) as node:
        for allowed in ("Bearer key-a", "bearer  key-a", "Bearer schlüssel-b"):
            assert status(node, allowed) == 200
        for denied in (None, "", "Bearer", "Bearer key", "Bearer key-aa", "Basic key-a", "# of team a"):
            assert status(node, denied) == 401
        assert node.client.with_options(api_key="key-a").models.list().data[0].id == MODEL
        with pytest.raises(openai.AuthenticationError) as raised:
            node.ask()
        assert (raised.value.code, raised.value.response.headers["www-authenticate"]) == ("invalid_api_key", "Bearer")
        assert node.engine.requests == []
        assert node.metric("aurora_serve_requests_total", outcome="rejected") == 8


def test_keys_are_added_and_removed_while_the_node_runs(file: Path) -> None:
    with running_node(Serve(api_keys_file=str(file))) as node:
        file.write_text("key-c\n")
        assert [status(node, f"Bearer {key}") for key in ("key-a", "key-c")] == [401, 200]
        file.write_text("")
        assert status(node, "Bearer key-c") == status(node, "Bearer") == 401
        file.unlink()
        assert status(node, "Bearer key-c") == 401


def test_only_the_api_needs_a_key(file: Path) -> None:
    with running_node(Serve(api_keys_file=str(file))) as node:
        paths = ("/health", "/ready", "/status", "/metrics")
        assert [status(node, None, path) for path in paths] == [200] * len(paths)
    with running_node() as node:
        assert status(node, None) == status(node, "Bearer anything") == 200


def test_a_request_without_a_key_is_rejected_before_its_body_arrives(file: Path) -> None:
    with running_node(Serve(api_keys_file=str(file))) as node:
        host, port = node.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
            answer = b""
            while received := connection.recv(4096):
                answer += received
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    monkeypatch.setattr("hmac.compare_digest", lambda sent, one: compared.append(one) or sent == one)
    assert is_authorized("Bearer a", [b"a", b"b", b"c"])
    assert compared == [b"a", b"b", b"c"]


def test_a_missing_file_is_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"serve\.api_keys_file .*none: No such file"):
        TokenFile("serve.api_keys_file", str(tmp_path / "none"))


def test_keys_for_an_api_that_sglang_serves_are_a_settings_error() -> None:
    with pytest.raises(SettingsError, match=r"serve\.api_keys_file needs serve\.engine = 'builtin'"):
        load(environ={}, flags={"serve.engine": "sglang", "serve.api_keys_file": "keys"})


def test_the_load_generator_sends_the_first_key(file: Path) -> None:
    serve = Serve(api_keys_file=str(file))
    assert read_api_key(Serve()) == ""
    with running_node(serve) as node:
        assert read_model_name(node.url, read_api_key(serve)) == MODEL
        requests = [chat_request(MODEL, Prompt("chat", "hello"), 8)]
        sent = Load(node.url, requests, 1, api_key=read_api_key(serve))
        sent.start()
        assert sent.wait(20)
    assert [response.text for response in sent.responses] == ["hello"]
    assert "key-a" not in repr(sent)
