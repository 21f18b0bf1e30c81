"""The sidecar of SGLang's server: the draft that the server starts with, and the servers that it does not support."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_sglang import KEY, FakeSglang, served
from sglang_stand_in import write_python
from tiny_target import write_tiny_target

from schemas.settings import Settings, SettingsError, load
from schemas.speculator import checkpoint
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import Verifier
from schemas.speculator.network import random_draft
from serving.engines.node.server_client import ServerError
from serving.engines.node.sidecar import read_target_line, write_first_draft
from serving.engines.sglang.node import launch
from serving.engines.sglang.node.client import SglangServer
from serving.engines.sglang.node.launch import read_served_draft
from serving.versions.alias_policy import RegistryAnswer
from serving.versions.cache import RegistryError


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def settings(target: Path, tmp_path: Path) -> Settings:
    flags = {
        "target.path": str(target),
        "speculator.draft_vocab_size": 16,
        "sglang.draft_dir": str(tmp_path / "drafts"),
        "sglang.api_key": KEY,
    }
    return load(environ={}, flags=flags)


def test_a_server_with_a_draft_of_another_line_is_not_supported(settings: Settings, tmp_path: Path) -> None:
    line = read_target_line(settings)
    other = read_target_line(
        load(environ={}, flags={"target.path": settings.target.path, "speculator.draft_vocab_size": 20})
    )
    fake = FakeSglang(other.day_0_draft, "day-0-head-0")
    checkpoint.write_checkpoint(other.day_0_draft, tmp_path / "served", other.target)
    with served(fake):
        server = SglangServer(fake.url, settings.sglang.api_key, 5)
        fake.draft = str(tmp_path / "served")
        with pytest.raises(ServerError, match=f"line {other.name}.*give {line.name}"):
            read_served_draft(server, line)
        fake.draft = str(tmp_path)
        with pytest.raises(ServerError, match="no version of Aurora"):
            read_served_draft(server, line)
        fake.release = "0.6.0"
        with pytest.raises(ServerError, match=r"SGLang 0\.6\.0 is not supported; supported: 0\.5\.21"):
            read_served_draft(server, line)


class _Registry:
    """A registry whose champion is the checkpoint in a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def read_aliases(self) -> RegistryAnswer:
        if self._folder is None:
            raise RegistryError("connection refused")
        return RegistryAnswer({"champion": "5"})

    def has_version(self, version: str) -> bool:
        return version == "5"

    def download(self, version: str, folder: Path) -> Path:
        assert self._folder
        return self._folder


def test_a_server_starts_with_the_version_that_the_alias_names(settings: Settings, tmp_path: Path) -> None:
    line = read_target_line(settings)
    seeded = settings.speculator.model_copy(update={"seed": 3})
    learned = read_target_line(settings.model_copy(update={"speculator": seeded})).day_0_draft
    checkpoint.write_checkpoint(learned, tmp_path / "learned", line.target)
    draft_dir = settings.sglang.draft_dir
    folder, draft = write_first_draft(settings, line, _Registry(tmp_path / "learned"), draft_dir)
    assert (folder.version, draft.fc.weight.equal(learned.fc.weight.bfloat16().float())) == ("5", True)
    assert checkpoint.read_checkpoint(folder.folder, line.name).fc.weight.equal(learned.fc.weight.bfloat16().float())
    other = random_draft(learned.shape, 4, torch.arange(16) + 3)
    checkpoint.write_checkpoint(other, tmp_path / "other", line.target, line=line.name)
    moved, _ = write_first_draft(settings, line, _Registry(tmp_path / "other"), draft_dir)
    assert torch.equal(checkpoint.read_checkpoint(moved.folder, line.name).d2t, other.d2t)
    again, _ = write_first_draft(settings, line, _Registry(None), draft_dir)
    assert (again.folder, again.version) == (folder.folder, "day-0-head-0")
    assert checkpoint.read_checkpoint(again.folder, line.name).fc.weight.equal(
        line.day_0_draft.fc.weight.bfloat16().float()
    )
    (tmp_path / "learned" / "extra").touch()
    defective, _ = write_first_draft(settings, line, _Registry(tmp_path / "learned"), draft_dir)
    assert defective.version == "day-0-head-0"


@pytest.mark.parametrize(
    ("version", "plugin", "message"),
    [
        ("0.5.20", "true", r"SGLang 0\.5\.20 is not supported; supported: 0\.5\.21, 0\.5\.22, 0\.5\.23"),
        ("0.5.21", "false", "our plugin is not"),
    ],
)
def test_a_python_without_a_supported_sglang_or_our_plugin_is_rejected(
    settings: Settings, tmp_path: Path, version: str, plugin: str, message: str
) -> None:
    python = write_python(tmp_path / "other", version, plugin)
    update = {"sglang": settings.sglang.model_copy(update={"python": str(python)})}
    with pytest.raises(SettingsError, match=rf"sglang\.python {python}: {message}"):
        launch.run(settings.model_copy(update=update), [])


def test_the_error_for_a_python_without_sglang_names_the_documentation(settings: Settings, tmp_path: Path) -> None:
    for python in (sys.executable, str(tmp_path / "nowhere")):
        update = {"sglang": settings.sglang.model_copy(update={"python": python})}
        with pytest.raises(SettingsError, match=r"sglang\.python .*docs/guides/sglang\.md"):
            launch.run(settings.model_copy(update=update), [])


def test_flags_for_a_running_server_are_an_error(settings: Settings) -> None:
    update = {"sglang": settings.sglang.model_copy(update={"url": "http://127.0.0.1:1"})}
    with pytest.raises(SettingsError, match=r"sglang\.url"):
        launch.run(settings.model_copy(update=update), ["--tp-size", "2"])


def test_a_draft_that_sglang_computes_differently_is_rejected_at_start(settings: Settings, tmp_path: Path) -> None:
    day_0 = read_target_line(settings).day_0_draft
    draft = random_draft(replace(day_0.shape, norm_before_residual=True), 1)
    write_draft_folder(draft, tmp_path / "theirs", "vllm", Verifier("target", (), 3))
    update = {
        "sglang": settings.sglang.model_copy(update={"url": "http://127.0.0.1:1"}),
        "speculator": settings.speculator.model_copy(update={"day_0_folder": str(tmp_path / "theirs")}),
    }
    with pytest.raises(SettingsError, match=r"norm_before_residual, which SGLang ignores; .*serve\.engine"):
        launch.run(settings.model_copy(update=update), [])
