"""A version loads in other projects' own classes, and what they write is imported: every tensor arrives.

vLLM is a server for GPUs and is not run here. Its loader (``llama_eagle3.py``), as read, renames ``midlayer.`` to
``layers.0.`` and ``d2t`` to ``draft_id_to_target_id``, leaves ``t2d`` out, takes the target's embeddings where the
version has none, and refuses every other name: the names are those that ``speculators`` reads.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_draft import SHAPE
from torch import Tensor

from schemas.speculator import checkpoint
from schemas.speculator.draft_folder import read_draft_folder, write_draft_folder
from schemas.speculator.layouts import Verifier
from schemas.speculator.network import DraftShape, EagleDraft, Variant, random_draft

ROOT = Path(__file__).resolve().parents[2]
READER = ROOT / "tests" / "support" / "foreign_readers.py"
WIDE = replace(SHAPE, hidden_size=64, head_dim=32, intermediate_size=96)
LAYER = "midlayer.self_attn"
CONFIG_OF_TARGET = {
    "hidden_size": WIDE.hidden_size,
    "vocab_size": WIDE.vocab_size,
    "num_hidden_layers": 8,
    "max_position_embeddings": WIDE.max_position_embeddings,
}
OF_THE_TARGET = {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}


def spread(shape: DraftShape) -> EagleDraft:
    """Return a random draft with gaps in its vocabulary, in numbers that bf16 holds exactly."""
    made = random_draft(shape, 3, torch.arange(shape.draft_vocab_size) * 2)
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return made


@pytest.fixture(scope="module")
def draft() -> EagleDraft:
    return spread(WIDE)


def read(python: Path, reader: str, draft: EagleDraft, folder: Path) -> dict[str, Tensor]:
    checkpoint.write_checkpoint(draft, folder / "version", "0" * 32)
    found = folder / "found.safetensors"
    done = subprocess.run(
        [python, "-P", READER, reader, folder / "version", found], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(found)


def hold(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], of_the_target: set[str]) -> None:
    """Equal values under every name, and no further name but those of what the reader takes from the target."""
    assert found.keys() == expected.keys() | of_the_target
    different = [name for name, value in expected.items() if not torch.equal(found[name].to(value.dtype), value)]
    assert not different
    assert not [name for name in expected if not torch.isfinite(found[name].float()).all()]


def imported(folder: Path, draft: EagleDraft, target: Path) -> str:
    """Import a folder for a target whose embeddings are ones; return the layout that was found."""
    target.mkdir()
    ones_VH = torch.ones(WIDE.vocab_size, WIDE.hidden_size)
    save_file({"model.embed_tokens.weight": ones_VH}, target / "model.safetensors")
    found = read_draft_folder(folder, target, CONFIG_OF_TARGET)
    assert found.draft.shape == draft.shape
    for name, value in draft.state_dict().items():
        assert torch.equal(found.draft.state_dict()[name], value), name
    return found.layout


def test_speculators_converts_and_reads_every_tensor_and_its_folder_is_imported(
    peers_python: Path, draft: EagleDraft, tmp_path: Path
) -> None:
    expected = {name.replace("midlayer.", "layers.0."): value for name, value in draft.state_dict().items()}
    hold(read(peers_python, "speculators", draft, tmp_path), expected, OF_THE_TARGET)
    assert imported(tmp_path / "converted", draft, tmp_path / "target") == "speculators"


@pytest.mark.parametrize("variant", ["eagle3", "eagle3.1"])
def test_speculators_reads_every_tensor_of_an_exported_folder(
    peers_python: Path, variant: Variant, tmp_path: Path
) -> None:
    draft = spread(replace(WIDE, variant=variant, norm_before_residual=True))
    write_draft_folder(draft, tmp_path / "exported", "speculators", Verifier("target", ("LlamaForCausalLM",), 4))
    expected = {name.replace("midlayer.", "layers.0."): value for name, value in draft.state_dict().items()}
    hold(read(peers_python, "exported", draft, tmp_path), expected, OF_THE_TARGET)


def test_specforge_reads_every_tensor_under_the_same_name_and_its_folder_is_imported(
    peers_python: Path, draft: EagleDraft, tmp_path: Path
) -> None:
    hold(read(peers_python, "specforge", draft, tmp_path), draft.state_dict(), {"embed_tokens.weight"})
    assert imported(tmp_path / "saved", draft, tmp_path / "target") == "sglang"


def test_sglang_reads_every_tensor(peers_python: Path, draft: EagleDraft, tmp_path: Path) -> None:
    found = read(peers_python, "sglang", draft, tmp_path)
    ours = draft.state_dict()
    kept = ours.pop("t2d").nonzero().flatten()
    expected = {
        "hot_token_id": ours.pop("d2t") + torch.arange(len(kept)),
        "model.layers.0.self_attn.qkv_proj.weight": torch.cat([ours.pop(f"{LAYER}.{p}_proj.weight") for p in "qkv"]),
        "model.layers.0.mlp.gate_up_proj.weight": torch.cat(
            [ours.pop(f"midlayer.mlp.{p}_proj.weight") for p in ("gate", "up")]
        ),
        "lm_head.weight": ours.pop("lm_head.weight"),
        **{f"model.{name.replace('midlayer.', 'layers.0.')}": value for name, value in ours.items()},
    }
    assert torch.equal(expected["hot_token_id"], kept)
    found["lm_head.weight"] = found["lm_head.weight"][: len(kept)]  # the server pads it to a multiple of 64 rows
    hold(found, expected, {"model.embed_tokens.weight"})
