"""The plugin does not record an unsupported server, and reports the reason."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from released_server import function, install_fakes

from serving.engines.sglang.plugin import compatibility

ROOT = Path(__file__).resolve().parents[3]


def test_importing_the_plugin_does_not_import_the_metrics_library() -> None:
    """SGLang sets the folder of that library's files only after it has loaded the plugins."""
    code = "import sys, serving.engines.sglang.plugin.plugin; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


@pytest.fixture(params=compatibility.SIGNATURES, autouse=True)
def _server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake of SGLang as released."""
    monkeypatch.setattr(compatibility, "version", lambda _: request.param)
    install_fakes(monkeypatch, compatibility.SIGNATURES[request.param], compatibility.FIELDS)


def test_a_released_server_is_supported() -> None:
    assert compatibility.check_installation() is None


def test_another_version_is_rejected_with_the_supported_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "version", lambda _: "9.9.9")
    assert (
        compatibility.check_installation()
        == f"SGLang 9.9.9 is not supported: this plugin supports SGLang {', '.join(compatibility.SIGNATURES)}"
    )


def test_a_changed_signature_or_record_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = compatibility.ACCEPT.rpartition(".")
    monkeypatch.setattr(sys.modules[module], name, function(("verify_input", "batch")))
    record, _, name = next(iter(compatibility.FIELDS)).rpartition(".")
    monkeypatch.setattr(sys.modules[record], name, dataclasses.make_dataclass("Record", ["draft_token"]))
    why = compatibility.check_installation()
    assert why is not None
    assert f"{compatibility.ACCEPT} takes verify_input, batch" in why
    assert "has no retrieve_next_token" in why


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = compatibility.RELEASE.rpartition(".")
    monkeypatch.delattr(sys.modules[module], name)
    assert compatibility.RELEASE in (compatibility.check_installation() or "")


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        (("cuda", 1, False), "--speculative-algorithm EAGLE3"),
        (("cuda", 2, True), "--pp-size 1"),
        (("npu", 1, True), "cpu and cuda"),
    ],
)
def test_an_unsupported_configuration_is_rejected_with_the_supported_one(
    given: tuple[str, int, bool], setting: str
) -> None:
    device, stages, is_eagle3 = given
    assert setting in (compatibility.check_server(device, stages, is_eagle3=is_eagle3) or "")
    assert compatibility.check_server("cuda", 1, is_eagle3=True) is None
