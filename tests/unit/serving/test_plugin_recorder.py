"""The origin of a server's traces names target and line as the built-in engine does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_target import write_tiny_target

from schemas.settings import Speculator
from schemas.speculator import checkpoint
from schemas.speculator.day_0_draft import create_day_0_draft
from schemas.speculator.target_fingerprint import target_fingerprint
from serving.engines.plugin.recorder import read_origin
from serving.traces.chunks import Origin

WIDTH = 3 * 32


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft") / "version"
    made = create_day_0_draft(target, Speculator(draft_vocab_size=16))
    checkpoint.write_checkpoint(made, folder, target_fingerprint(target))
    return folder


def test_target_and_line_equal_those_of_the_built_in_engine(target: Path, draft: Path) -> None:
    fingerprint = target_fingerprint(target)
    made = create_day_0_draft(target, Speculator(draft_vocab_size=16))
    line = checkpoint.line_name(fingerprint, made.shape, made.d2t)
    assert read_origin("n", str(target), str(draft), WIDTH) == Origin("n", fingerprint, line, made.shape.vocab_size)


def test_a_draft_for_another_target_is_rejected(draft: Path, tmp_path: Path) -> None:
    other = write_tiny_target(tmp_path, seed=1)
    with pytest.raises(checkpoint.CheckpointError, match="is a draft for target"):
        read_origin("n", str(other), str(draft), WIDTH)


def test_a_draft_with_another_feature_width_is_rejected(target: Path, draft: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="the server has 5"):
        read_origin("n", str(target), str(draft), 5)


def test_a_draft_without_a_manifest_is_rejected(target: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"manifest.json: missing"):
        read_origin("n", str(target), str(target), WIDTH)


def test_a_name_outside_the_hub_cache_is_rejected(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="neither a folder nor in the hub's cache"):
        read_origin("n", str(target), "nobody/never-made", WIDTH)
