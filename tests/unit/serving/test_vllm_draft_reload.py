"""The draft of a vLLM worker is replaced completely, or the one before is restored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_target import write_tiny_target
from torch import Tensor

from schemas.errors import UserError
from schemas.settings import Speculator
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import MANIFEST, CheckpointError, hash_file
from schemas.speculator.day_0_draft import create_day_0_draft
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import Shard, Verifier, fuse_tensors, shard_tensors
from schemas.speculator.target_fingerprint import target_fingerprint
from serving.engines.vllm.plugin.draft_reload import ATTACHED, DraftReload, read_foreign_draft, read_held_draft

KEY_HEADS = 2
"""Of ``write_tiny_target``."""


class Model:
    """vLLM's draft model in one worker, in float32. Like a kernel of a CPU it keeps one matrix in another shape."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.shard, self.spoiled = Shard(), "model.norm.weight"
        self.fails = 0
        self.spoils = False

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if self.fails:
            self.fails -= 1
            self.held = {name: torch.zeros_like(value) for name, value in self.held.items()}
            raise KeyError("no such tensor")
        own = {name: value for name, value in tensors.items() if name not in ("d2t", "t2d")}
        parts = fuse_tensors(shard_tensors(own, KEY_HEADS, self.shard))
        self.held = {name: value.float() for name, value in parts.items()}
        self.held["draft_id_to_target_id"] = tensors["d2t"]
        self.held["model.fc.weight"] = torch.empty(0)
        if self.spoils:
            self.spoils = False
            self.held[self.spoiled] = self.held[self.spoiled] + 1

    def named_parameters(self) -> Any:
        return [(name, torch.nn.Parameter(value, requires_grad=False)) for name, value in self.held.items()]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("versions")
    target = write_tiny_target(folder / "target")
    for number in (1, 2):
        draft = create_day_0_draft(target, Speculator(draft_vocab_size=16, seed=number))
        draft.norm.weight.data += number
        checkpoint.write_checkpoint(draft, folder / str(number), target_fingerprint(target))
    return {name: folder / name for name in ("1", "2")}


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def draft(model: Model, versions: dict[str, Path]) -> DraftReload:
    found = DraftReload(model, model.load, read_held_draft(versions["1"], "1"), Shard())
    model.load(found._served)
    return found


def read(draft: DraftReload, folder: Path, digest: str | None = None) -> None:
    deadline = time.monotonic() + 20
    while not draft.read(folder, digest or hash_file(folder / MANIFEST)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def holds(model: Model, folder: Path) -> bool:
    expected = checkpoint.read_tensor(folder, "norm.weight").float()
    return model.held["model.norm.weight"].equal(expected)


def test_a_version_is_read_and_then_loaded(draft: DraftReload, model: Model, versions: dict[str, Path]) -> None:
    read(draft, versions["2"])
    assert (draft.version, holds(model, versions["1"])) == ("1", True)
    assert draft.load("2") > 0
    assert (draft.version, holds(model, versions["2"])) == ("2", True)


def test_equal_weights_are_renamed_without_loading(draft: DraftReload, model: Model, versions: dict[str, Path]) -> None:
    model.fails = 9
    read(draft, versions["1"])
    draft.load("5")
    assert (draft.version, holds(model, versions["1"])) == ("5", True)


@pytest.mark.parametrize("fault", ["fails", "spoils"])
def test_a_failed_load_restores_the_version_before(
    draft: DraftReload, model: Model, versions: dict[str, Path], fault: str
) -> None:
    read(draft, versions["2"])
    setattr(model, fault, 1)
    with pytest.raises(UserError, match=r"(no such tensor|model\.norm\.weight).*; version 1 still serves"):
        draft.load("2")
    assert (draft.version, holds(model, versions["1"])) == ("1", True)
    read(draft, versions["2"])
    draft.load("2")
    assert holds(model, versions["2"])


@pytest.mark.parametrize("spoiled", ["lm_head.weight", "model.layers.0.self_attn.qkv_proj.weight"])
def test_a_rank_compares_its_parts_of_the_tensors(model: Model, versions: dict[str, Path], spoiled: str) -> None:
    model.shard, model.spoiled = Shard(1, 2), spoiled
    draft = DraftReload(model, model.load, read_held_draft(versions["1"], "1"), model.shard)
    model.load(draft._served)
    read(draft, versions["2"])
    model.spoils = True
    with pytest.raises(UserError, match=rf"{spoiled}; version 1 still serves"):
        draft.load("2")
    read(draft, versions["2"])
    draft.load("2")
    assert holds(model, versions["2"])


def test_a_draft_that_somebody_else_has_started_with_is_restored_if_a_version_fails(
    model: Model, versions: dict[str, Path], tmp_path: Path
) -> None:
    target, line = versions["1"].parent / "target", checkpoint.read_manifest(versions["1"]).line
    foreign = checkpoint.read_checkpoint(versions["2"], line)
    foreign.norm.weight.data += 5
    write_draft_folder(foreign, tmp_path / "own", "vllm", Verifier("target", (), 3))
    held = read_foreign_draft(tmp_path / "own", target, versions["1"], "1")
    assert (held.version, held.line) == (ATTACHED, line)
    draft = DraftReload(model, model.load, held, Shard())
    model.load(held.tensors)
    read(draft, versions["2"])
    model.fails = 1
    with pytest.raises(UserError, match="version attached still serves"):
        draft.load("2")
    assert model.held["model.norm.weight"].equal(foreign.norm.weight.data.bfloat16().float())
    read(draft, versions["2"])
    draft.load("2")
    assert (draft.version, holds(model, versions["2"])) == ("2", True)


def test_a_draft_with_the_weights_of_the_first_version_has_its_name(versions: dict[str, Path], tmp_path: Path) -> None:
    target, line = versions["1"].parent / "target", checkpoint.read_manifest(versions["1"]).line
    own = checkpoint.read_checkpoint(versions["1"], line)
    write_draft_folder(own, tmp_path / "own", "vllm", Verifier("target", (), 3))
    assert read_foreign_draft(tmp_path / "own", target, versions["1"], "7").version == "7"


def test_a_draft_of_another_shape_is_rejected(versions: dict[str, Path], tmp_path: Path) -> None:
    target = versions["1"].parent / "target"
    wider = create_day_0_draft(target, Speculator(draft_vocab_size=32))
    write_draft_folder(wider, tmp_path / "own", "vllm", Verifier("target", (), 3))
    with pytest.raises(CheckpointError, match=r"another shape than line .* speculator\.day_0_folder"):
        read_foreign_draft(tmp_path / "own", target, versions["1"], "1")


def test_a_failed_restoration_is_reported(draft: DraftReload, model: Model, versions: dict[str, Path]) -> None:
    read(draft, versions["2"])
    model.fails = 2
    with pytest.raises(UserError, match="the version before could not be restored"):
        draft.load("2")


def test_another_manifest_or_an_altered_file_is_not_loaded(
    draft: DraftReload, versions: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="is not the expected 0000"):
        read(draft, versions["2"], "0" * 64)
    altered = tmp_path / "altered"
    altered.mkdir()
    for file in versions["2"].iterdir():
        (altered / file.name).write_bytes(file.read_bytes())
    data = bytearray((altered / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (altered / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is not the manifest's"):
        read(draft, altered)
    with pytest.raises(UserError, match="no version has been read"):
        draft.load("2")
