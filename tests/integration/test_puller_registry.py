"""The puller against a real MLflow server, with versions as the trainer registers them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_draft import SHAPE

from schemas.settings import Registry as RegistrySettings
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft, random_draft
from serving.engine import Swapped
from serving.puller import Puller, RegistryError
from serving.registry import MlflowRegistry
from trainer.registry import SpeculatorRegistry


class Engine:
    """Takes drafts of one line."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.served: list[tuple[str, EagleDraft]] = []

    def check(self, draft: EagleDraft) -> None:
        assert torch.isfinite(draft.fc.weight).all()

    def swap(self, draft: EagleDraft, version: str) -> Swapped:
        self.served.append((version, draft))
        return Swapped(version, 0, 0.1)


class Line:
    """A speculator line of the test's own, with a node that follows it."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.folder = folder
        self.target = uuid.uuid4().hex
        self.trainer = SpeculatorRegistry(RegistrySettings(uri=uri))
        self.name = self.write("probe", seed=0).line
        self.engine = Engine(self.name)
        registry = MlflowRegistry(RegistrySettings(uri=uri, timeout_s=5), self.name)
        self.puller = Puller(registry, self.engine, "champion", 1.0)  # type: ignore[arg-type]

    def write(self, name: str, seed: int) -> checkpoint.Manifest:
        return checkpoint.write(random_draft(SHAPE, seed), self.folder / name, self.target)

    def register(self, name: str) -> str:
        return self.trainer.register(self.name, self.folder / name, {}, {})


@pytest.fixture
def line(registry: str, tmp_path: Path) -> Line:
    return Line(registry, tmp_path)


def test_what_the_trainer_registers_and_the_alias_names_is_served(line: Line) -> None:
    line.puller.poll()
    assert (line.engine.served, line.puller.error) == ([], None)

    line.write("first", seed=1)
    first = line.register("first")
    line.puller.poll()
    assert (line.engine.served, line.puller.error) == ([], None)

    line.trainer.point(line.name, "champion", first)
    line.puller.poll()
    ((version, draft),) = line.engine.served
    assert version == first
    assert torch.equal(draft.lm_head.weight, random_draft(SHAPE, 1).lm_head.weight.bfloat16().float())

    line.write("second", seed=2)
    line.trainer.point(line.name, "champion", line.register("second"))
    line.puller.poll()
    line.trainer.point(line.name, "champion", first)
    line.puller.poll()
    assert [version for version, _ in line.engine.served] == ["1", "2", "1"]
    assert (line.puller.error, line.puller.refused) == (None, ())


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "extra.bin"])
def test_a_version_with_an_altered_or_foreign_file_is_refused_with_its_reason(line: Line, file: str) -> None:
    line.write("bad", seed=1)
    path = line.folder / "bad" / file
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b" ")
    line.trainer.point(line.name, "champion", line.register("bad"))
    line.puller.poll()
    (refusal,) = line.puller.refused
    assert (refusal.version, line.engine.served, line.puller.error) == ("1", [], None)
    assert file in refusal.why


def test_a_registry_that_is_not_there_costs_a_moment_and_is_reported(free_port: Callable[[], int]) -> None:
    registry = MlflowRegistry(RegistrySettings(uri=f"http://127.0.0.1:{free_port()}", timeout_s=5), "line")
    started = time.monotonic()
    with pytest.raises(RegistryError, match=r"registry\.uri"):
        registry.named("champion")
    assert time.monotonic() - started < 60


def test_files_that_are_gone_from_the_registry_are_not_the_versions_fault(line: Line) -> None:
    line.write("first", seed=1)
    version = line.register("first")
    model = f"aurora.{line.name}"
    client = line.trainer._client
    run = client.get_model_version(model, version).run_id
    client.create_model_version(model, f"runs:/{run}/nothing", run)
    line.trainer.point(line.name, "champion", "2")
    line.puller.poll()
    assert line.puller.error
    assert (line.puller.refused, line.engine.served) == ((), [])
    line.trainer.point(line.name, "champion", version)
    line.puller.poll()
    assert (line.puller.error, [v for v, _ in line.engine.served]) == (None, ["1"])
