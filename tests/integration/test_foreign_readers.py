"""A version loads in other projects' own classes: every tensor arrives, and nothing that they make stays empty.

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
from safetensors.torch import load_file
from tiny_draft import SHAPE
from torch import Tensor

from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft, random_draft

ROOT = Path(__file__).resolve().parents[2]
READER = ROOT / "tests" / "support" / "foreign_readers.py"
WIDE = replace(SHAPE, hidden_size=64, head_dim=32, intermediate_size=96)
LAYER = "midlayer.self_attn"


@pytest.fixture(scope="module")
def draft() -> EagleDraft:
    """A random draft with gaps in its vocabulary, in numbers that bf16 holds exactly."""
    made = random_draft(WIDE, seed=3)
    kept = torch.arange(WIDE.draft_vocab_size) * 2
    made.d2t.copy_(kept - torch.arange(len(kept)))
    made.t2d.zero_()[kept] = True
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return made


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


def test_speculators_converts_and_reads_every_tensor(peers_python: Path, draft: EagleDraft, tmp_path: Path) -> None:
    expected = {name.replace("midlayer.", "layers.0."): value for name, value in draft.state_dict().items()}
    of_the_target = {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
    hold(read(peers_python, "speculators", draft, tmp_path), expected, of_the_target)


def test_specforge_reads_every_tensor_under_the_same_name(
    peers_python: Path, draft: EagleDraft, tmp_path: Path
) -> None:
    hold(read(peers_python, "specforge", draft, tmp_path), draft.state_dict(), {"embed_tokens.weight"})


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
