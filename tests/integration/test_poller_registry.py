"""The poller against a real MLflow server, with versions as the trainer registers them."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import time
import uuid
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from idle_health import IDLE
from safetensors.torch import load_file, save_file
from tiny_draft import SHAPE

from schemas.events import AUDITED_TAG, AuditState
from schemas.settings import Canary, Settings
from schemas.settings import Registry as RegistrySettings
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft, random_draft
from serving.engines.base import EngineHealth, SwapResult
from serving.versions.cache import MlflowRegistry, RegistryError
from serving.versions.poller import VersionPoller
from trainer.release.registry import SpeculatorRegistry


class Engine:
    """An engine that accepts drafts of one line."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.served: list[tuple[str, EagleDraft]] = []

    def check(self, draft: EagleDraft) -> None:
        assert torch.isfinite(draft.fc.weight).all()

    def health(self) -> EngineHealth:
        return IDLE

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
        self.served.append((version, draft))
        return SwapResult(version, 0, 0.1)


class Line:
    """A speculator line of the test's own, with a poller that follows it."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.folder = folder
        self.target = uuid.uuid4().hex
        self.trainer = SpeculatorRegistry(RegistrySettings(tracking_uri=uri))
        self.name = self.write("probe", seed=0).line
        self.engine = Engine(self.name)
        self.uri, self.client = uri, self.trainer._client
        self.moves = 0
        self.poller = self.node(Canary())

    def node(self, canary: Canary) -> VersionPoller:
        registry = MlflowRegistry(RegistrySettings(tracking_uri=self.uri, timeout=5), self.name)
        return VersionPoller(registry, self.engine, Settings(canary=canary))  # type: ignore[arg-type]

    def record(self, **aliases: str) -> None:
        """Move aliases and record the moves, as a promoter does."""
        self.moves += 1
        for alias, version in aliases.items():
            self.trainer.set_alias(self.name, alias, version)  # type: ignore[arg-type]
        audited = AuditState(moves=self.moves, aliases=aliases)  # type: ignore[arg-type]
        self.client.set_registered_model_tag(f"aurora.{self.name}", AUDITED_TAG, audited.model_dump_json())

    def write(self, name: str, seed: int) -> checkpoint.Manifest:
        return checkpoint.write_checkpoint(random_draft(SHAPE, seed), self.folder / name, self.target)

    def register(self, name: str) -> str:
        return self.trainer.register(self.name, self.folder / name, {}, {})


@pytest.fixture
def line(registry: str, tmp_path: Path) -> Line:
    return Line(registry, tmp_path)


def test_a_registered_version_with_the_alias_is_served(line: Line) -> None:
    line.poller.poll()
    assert (line.engine.served, line.poller.error) == ([], None)

    line.write("first", seed=1)
    first = line.register("first")
    line.poller.poll()
    assert (line.engine.served, line.poller.error) == ([], None)

    line.trainer.set_alias(line.name, "champion", first)
    line.poller.poll()
    ((version, draft),) = line.engine.served
    assert version == first
    assert torch.equal(draft.lm_head.weight, random_draft(SHAPE, 1).lm_head.weight.bfloat16().float())

    line.write("second", seed=2)
    line.trainer.set_alias(line.name, "champion", line.register("second"))
    line.poller.poll()
    line.trainer.set_alias(line.name, "champion", first)
    line.poller.poll()
    assert [version for version, _ in line.engine.served] == ["1", "2", "1"]
    assert (line.poller.error, line.poller.rejected) == (None, ())


def test_a_recorded_line_rolls_back_by_the_record_and_serves_its_canary(line: Line) -> None:
    for number in (1, 2):
        line.write(str(number), seed=number)
        line.register(str(number))
    line.record(champion="2")
    line.poller.poll()
    line.trainer.set_alias(line.name, "champion", "1")
    line.poller.poll()
    assert [version for version, _ in line.engine.served] == ["2"]
    line.record(champion="1")
    line.poller.poll()
    assert [version for version, _ in line.engine.served] == ["2", "1"]

    canary_poller = line.node(Canary(share=1.0))
    line.record(champion="1", canary="2")
    canary_poller.poll()
    assert (line.engine.served[-1][0], canary_poller.role, canary_poller.error) == ("2", "canary", None)
    line.client.delete_registered_model_alias(f"aurora.{line.name}", "canary")
    canary_poller.poll()
    assert (line.engine.served[-1][0], canary_poller.role, canary_poller.error) == ("1", "champion", None)


def resealed(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Return an edit of the tensors that also updates the manifest."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"]["model.safetensors"] = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


def lengthen(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes() + b" ") and None


def add_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": [0.0]}))


def make_foreign(folder: Path) -> None:
    shutil.rmtree(folder)
    checkpoint.write_checkpoint(random_draft(SHAPE, 1), folder, "0" * 32)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (resealed(lambda t: t.update({"norm.weight": torch.zeros(7)})), r"norm.weight: shape \[7\], expected \[8\]"),
        (resealed(lambda t: t.pop("fc.weight")), "missing tensors: fc.weight"),
        (resealed(lambda t: t["fc.weight"].fill_(torch.nan)), "fc.weight: values are not finite"),
        (lengthen("model.safetensors"), "model.safetensors: SHA-256"),
        (lengthen("config.json"), "config.json: SHA-256"),
        (add_pickle, "unknown files: pytorch_model.bin"),
        (make_foreign, "expected line"),
    ],
)
def test_a_defective_version_is_rejected_with_the_reason(line: Line, harm: Callable[[Path], None], why: str) -> None:
    node = line.node(Canary(share=1.0))
    line.write("good", seed=1)
    line.write("bad", seed=2)
    harm(line.folder / "bad")
    good, bad = line.register("good"), line.register("bad")
    line.trainer.set_alias(line.name, "champion", good)
    node.poll()
    for alias in ("canary", "champion"):
        line.trainer.set_alias(line.name, alias, bad)
        node.poll()
    (rejected,) = node.rejected
    assert (rejected.version, node.error) == (bad, None)
    assert re.search(why, rejected.why)
    assert [version for version, _ in line.engine.served] == [good]
    assert (node.role, node.canary) == ("champion", None)


def test_an_unreachable_registry_is_reported_within_the_timeout(free_port: Callable[[], int]) -> None:
    registry = MlflowRegistry(RegistrySettings(tracking_uri=f"http://127.0.0.1:{free_port()}", timeout=5), "line")
    started = time.monotonic()
    with pytest.raises(RegistryError, match=r"registry\.tracking_uri"):
        registry.read_aliases()
    assert time.monotonic() - started < 60


def test_missing_files_in_the_registry_do_not_reject_the_version(line: Line) -> None:
    line.write("first", seed=1)
    version = line.register("first")
    model = f"aurora.{line.name}"
    client = line.client
    run = client.get_model_version(model, version).run_id
    client.create_model_version(model, f"runs:/{run}/nothing", run)
    line.trainer.set_alias(line.name, "champion", "2")
    line.poller.poll()
    assert line.poller.error
    assert (line.poller.rejected, line.engine.served) == ((), [])
    line.trainer.set_alias(line.name, "champion", version)
    line.poller.poll()
    assert (line.poller.error, [v for v, _ in line.engine.served]) == (None, ["1"])
