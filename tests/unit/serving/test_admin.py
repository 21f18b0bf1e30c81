"""The admin API: authentication, and the effect of pin, unpin, off and on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_node import Node, eventually, running_node
from echo_engine import EchoEngine
from fastapi import FastAPI
from pydantic import SecretStr
from version_registry import LINE, FakeRegistry

from schemas.settings import Serve, Settings, SettingsError
from schemas.status import ServeStatus, SpeculatorStatus
from serving.http import admin as admin_api
from serving.http.server import BackgroundServer, bind
from serving.versions.poller import VersionPoller

TOKEN = "geheim-größe"
SERVE = Serve(admin_token=SecretStr(TOKEN), poll_interval=0.01)
ENDPOINTS = [("GET", ""), *(("POST", path) for path in ("/pin", "/unpin", "/off", "/on"))]


def bearer(token: str) -> dict[bytes, bytes]:
    return {b"authorization": f"Bearer {token}".encode()}


class Admin:
    """A node with its admin API, a running poller, and a fake registry."""

    def __init__(self, node: Node, registry: FakeRegistry, poller: VersionPoller) -> None:
        self.node, self.registry, self.poller = node, registry, poller

    def call(self, method: str, path: str, **body: object) -> httpx.Response:
        url = f"{self.node.url}/admin/speculator{path}"
        return httpx.request(method, url, headers=bearer(TOKEN), json=body or None, timeout=20)

    def post(self, path: str, **body: object) -> SpeculatorStatus:
        answer = self.call("POST", path, **body)
        assert answer.status_code == 200, answer.text
        return SpeculatorStatus.model_validate(answer.json())

    def rejected(self, path: str, **body: object) -> tuple[int, str, str]:
        answer = self.call("POST", path, **body)
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["message"]

    def state(self) -> SpeculatorStatus:
        return SpeculatorStatus.model_validate(self.call("GET", "").json())


class DraftingEngine(EchoEngine):
    line = LINE


@pytest.fixture
def admin() -> Iterator[Admin]:
    engine, registry = DraftingEngine(), FakeRegistry()
    poller = VersionPoller(registry, engine, Settings(serve=SERVE))
    poller.start()
    with running_node(SERVE, engine, poller) as node:
        yield Admin(node, registry, poller)
    poller.stop()


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_without_a_token_in_the_settings_the_endpoints_are_closed(method: str, path: str) -> None:
    with running_node() as node:
        for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer x"}):
            answer = httpx.request(method, f"{node.url}/admin/speculator{path}", headers=headers)
            assert answer.status_code == 403
            assert "serve.admin_token" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x"])
def test_without_the_right_token_nothing_happens(
    admin: Admin, method: str, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {b"authorization": authorization.encode()}
    answer = httpx.request(method, f"{admin.node.url}/admin/speculator{path}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_token")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in answer.text
    assert admin.node.engine.speculating


def test_tokens_of_a_file_can_be_added_and_removed_while_the_node_runs(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# of the old deployment\nold\n")

    def status(node: Node, token: str) -> int:
        return httpx.get(f"{node.url}/admin/speculator", headers=bearer(token)).status_code

    with running_node(Serve(admin_tokens_file=str(file))) as node:
        assert [status(node, token) for token in ("old", "new", "# of the old deployment")] == [200, 401, 401]
        file.write_text("old\n  new\n")
        assert [status(node, token) for token in ("old", "new")] == [200, 200]
        file.write_text("new\n")
        assert [status(node, token) for token in ("old", "new")] == [401, 200]
        file.unlink()
        assert status(node, "new") == 403
    file.write_text("b\n")
    with running_node(SERVE.model_copy(update={"admin_tokens_file": str(file)})) as node:
        assert [status(node, token) for token in (TOKEN, "b", "new")] == [200, 200, 401]


def test_a_missing_token_file_is_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"serve\.admin_tokens_file .*No such file"):
        admin_api.add_routes(FastAPI(), Serve(admin_tokens_file=str(tmp_path / "none")), EchoEngine(), None)


def test_the_admin_api_can_have_a_port_of_its_own() -> None:
    engine = EchoEngine()
    app = admin_api.create_app(SERVE)
    admin_api.add_routes(app, SERVE, engine, None)
    with bind("127.0.0.1", 0) as admin_socket:
        server = BackgroundServer(app, admin_socket, "admin-http")
        url = f"http://127.0.0.1:{admin_socket.getsockname()[1]}"
        for path, expected in (("/admin/speculator", 200), ("/v1/models", 404), ("/status", 404)):
            assert httpx.get(url + path, headers=bearer(TOKEN)).status_code == expected
        assert httpx.get(f"{url}/admin/speculator").status_code == 401
        assert httpx.post(f"{url}/admin/speculator/off", headers=bearer(TOKEN)).status_code == 200
        assert not engine.speculating
        body = b"x" * (SERVE.max_body_bytes + 1)
        assert httpx.post(f"{url}/admin/speculator/pin", headers=bearer(TOKEN), content=body).status_code == 413
        server.close()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/admin/speculator")


def test_a_taken_admin_port_is_an_error_that_names_its_setting() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(SettingsError, match=r"^serve\.admin_port: cannot listen"):
            bind("127.0.0.1", taken.getsockname()[1], "serve.admin_")


def test_the_status_shows_the_active_version_and_its_role(admin: Admin) -> None:
    admin.registry.alias = "1"
    eventually(lambda: admin.state().version == "1")
    state = admin.state()
    assert (state.line, state.alias, state.alias_version, state.pinned) == (LINE, "champion", "1", None)
    assert (state.speculating, state.registry_error, state.versions_rejected) == (True, None, [])
    assert (state.role, state.canary_version, state.anchor_version) == ("champion", None, None)
    assert state.update_blocked is None
    assert [swap.version for swap in state.swaps] == ["1"]


def test_a_pinned_version_stays_active_until_it_is_unpinned(admin: Admin) -> None:
    admin.registry.alias = "1"
    eventually(lambda: admin.state().version == "1")
    pinned = admin.post("/pin", version="3")
    assert (pinned.version, pinned.pinned, pinned.role) == ("3", "3", "pinned")
    admin.registry.alias = "2"
    eventually(lambda: admin.state().alias_version == "2")
    assert (admin.state().version, admin.state().pinned) == ("3", "3")
    assert ServeStatus.model_validate(httpx.get(f"{admin.node.url}/status").json()).pinned == "3"
    unpinned = admin.post("/unpin")
    assert (unpinned.version, unpinned.pinned) == ("2", None)
    assert [swap.version for swap in unpinned.swaps] == ["1", "3", "2"]


def test_an_unknown_version_is_a_404_and_changes_nothing(admin: Admin) -> None:
    status, code, message = admin.rejected("/pin", version="9")
    assert (status, code) == (404, "version_not_found")
    assert "'9'" in message
    assert (admin.state().pinned, admin.state().version) == (None, "day-0-head-0")


def test_a_defective_version_is_a_409_with_the_reason_at_every_try(admin: Admin) -> None:
    admin.registry.foreign = {"2"}
    for _ in range(2):
        status, code, message = admin.rejected("/pin", version="2")
        assert (status, code) == (409, "version_rejected")
        assert "speculator line" in message
    assert admin.registry.downloads == ["2"]
    assert (admin.state().pinned, [r.version for r in admin.state().versions_rejected]) == (None, ["2"])


def test_an_unreachable_registry_is_a_503_and_changes_nothing(admin: Admin) -> None:
    admin.post("/pin", version="1")
    admin.registry.unreachable = True
    assert admin.rejected("/pin", version="2")[:2] == (503, "registry_unavailable")
    assert (admin.state().pinned, admin.state().version) == ("1", "1")


def test_a_slow_pin_is_a_202_and_completes_later(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_api, "_TIMEOUT_S", 0.05)
    admin.registry.open.clear()
    answer = admin.call("POST", "/pin", version="1")
    assert (answer.status_code, answer.json()["pinned"]) == (202, None)
    admin.registry.open.set()
    eventually(lambda: admin.state().pinned == "1")


@pytest.mark.parametrize("body", [{}, {"version": ""}, {"version": 7}, {"version": "7", "force": True}])
def test_a_pin_without_a_version_is_rejected(admin: Admin, body: dict[str, object]) -> None:
    assert admin.rejected("/pin", **body)[0] == 400
    assert admin.node.metric("aurora_serve_requests_total", outcome="rejected") == 0


def test_speculation_can_be_switched_off_and_on(admin: Admin) -> None:
    off = admin.post("/off")
    assert (off.speculating, off.version) == (False, "day-0-head-0")
    raw = admin.node.client.completions.with_raw_response.create(model="echo-1", prompt="hello")
    assert raw.headers["x-aurora-speculator"] == ""
    assert admin.post("/on").speculating
    raw = admin.node.client.completions.with_raw_response.create(model="echo-1", prompt="hello")
    assert raw.headers["x-aurora-speculator"] == "day-0-head-0"


@pytest.mark.parametrize("path", ["/pin", "/unpin", "/on"])
def test_a_node_without_speculation_rejects_pin_unpin_and_on(path: str) -> None:
    with running_node(SERVE.model_copy(update={"speculate": False}), EchoEngine()) as node:
        answer = httpx.post(
            f"{node.url}/admin/speculator{path}",
            headers=bearer(TOKEN),
            json={"version": "1"},
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "speculation_disabled")
    assert "serve.speculate" in answer.json()["error"]["message"]


def test_a_node_without_versions_rejects_pin_and_unpin_and_can_be_switched_off_and_on() -> None:
    with running_node(SERVE.model_copy(update={"drafter": "suffix"}), EchoEngine()) as node:

        def post(path: str) -> httpx.Response:
            return httpx.post(f"{node.url}/admin/speculator{path}", headers=bearer(TOKEN), json={"version": "1"})

        for path in ("/pin", "/unpin"):
            assert post(path).status_code == 409
            assert "serve.drafter" in post(path).json()["error"]["message"]
        assert [post(path).json()["speculating"] for path in ("/off", "/on")] == [False, True]
