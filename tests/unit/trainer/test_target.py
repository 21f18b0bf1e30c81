"""The trainer reads of its target only the tensors that it uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from trainer_world import write_target

from schemas.settings import Settings, load
from schemas.speculator import checkpoint, target_fingerprint
from trainer.data.target import read_target

LAYERS = 8


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return settings with a target whose embeddings, decoder layers and output layer are in separate shards."""
    folder = tmp_path / "target"
    write_target(folder)
    whole = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(whole)
    whole.unlink()
    embeddings, output = "model.embed_tokens.weight", "lm_head.weight"
    layers = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(64, 16) for i in range(LAYERS)}
    shards = ({embeddings: tensors[embeddings]}, layers, {output: tensors[output], "model.norm.weight": torch.ones(16)})
    for number, shard in enumerate(shards, 1):
        save_file(shard, folder / f"model-{number:05}-of-00003.safetensors")
    flags = {
        "target.path": str(folder),
        "target.fingerprint_cache": str(tmp_path / "fingerprints.json"),
        "speculator.draft_vocab_size": 32,
    }
    return load(environ={}, flags=flags)


def test_a_start_reads_embeddings_and_output_layer_alone(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, int] = {}

    class RecordingFile:
        """A safetensors file that records what is read from it."""

        def __init__(self, path: Path, framework: str) -> None:
            self._opened: Any = safetensors.safe_open(path, framework=framework)

        def __enter__(self) -> Any:
            self._file = self._opened.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._opened.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._file.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            tensor: torch.Tensor = self._file.get_tensor(name)
            read[name] = tensor.nbytes
            return tensor

    def recording(path: Path) -> str:
        read[path.name] = path.stat().st_size
        return checkpoint.hash_file(path)

    monkeypatch.setattr(target_fingerprint, "SETTLED_S", -60.0)
    first = read_target(settings)
    monkeypatch.setattr(checkpoint, "safe_open", RecordingFile)
    monkeypatch.setattr(target_fingerprint, "hash_file", recording)
    second = read_target(settings)
    assert (second.fingerprint, second.line) == (first.fingerprint, first.line)
    vocabulary, hidden = second.embeddings_VH.shape
    size = vocabulary * hidden * second.embeddings_VH.element_size()
    assert read == {"model.embed_tokens.weight": size, "lm_head.weight": size}


def test_a_changed_decoder_layer_changes_the_line(settings: Settings) -> None:
    folder = Path(settings.target.path)
    before = read_target(settings)
    shard = folder / "model-00002-of-00003.safetensors"
    tensors = safetensors.torch.load_file(shard)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard)
    after = read_target(settings)
    assert after.fingerprint != before.fingerprint
    assert after.line != before.line
