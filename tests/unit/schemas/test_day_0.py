"""What every process of a line begins with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_target import write_tiny_target

from schemas.settings import Speculator
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.initial_draft import draft_of_day_0, read_line, token_embeddings
from schemas.speculator.network import EagleDraft

NEAR = Speculator(draft_vocab_size=16)
RANDOM = Speculator(draft_vocab_size=16, init="random")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_tiny_target(tmp_path / "target")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def passed_through(draft: EagleDraft) -> float:
    """How alike the highest captured layer is to what ``fuse`` makes of it, the others being zero."""
    hidden = torch.randn(1, 9, draft.shape.hidden_size, generator=torch.Generator().manual_seed(0))
    others = torch.zeros(1, 9, 2 * draft.shape.hidden_size)
    fused = draft.fuse(torch.cat([others, hidden], dim=-1))
    return torch.cosine_similarity(fused, hidden, dim=-1).min().item()


def test_it_scores_with_the_targets_own_output_and_lets_the_highest_layer_through(target: Path) -> None:
    near, drawn = draft_of_day_0(target, NEAR), draft_of_day_0(target, RANDOM)
    assert torch.equal(near.lm_head.weight, weights(target)["lm_head.weight"].float()[near.t2d])
    assert passed_through(near) > 0.9
    assert passed_through(drawn) < 0.9
    assert not torch.equal(drawn.lm_head.weight, near.lm_head.weight)
    assert torch.equal(drawn.midlayer.mlp.up_proj.weight, near.midlayer.mlp.up_proj.weight)


def test_where_output_and_embeddings_are_one_it_takes_those(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    draft = draft_of_day_0(target, NEAR)
    assert torch.equal(draft.lm_head.weight, token_embeddings(target).float()[draft.t2d])


def test_where_it_begins_is_not_part_of_the_line(target: Path) -> None:
    assert read_line(target, NEAR).name == read_line(target, RANDOM).name


def test_an_output_that_cannot_be_taken_is_told_with_the_setting_that_does_without(target: Path) -> None:
    kept = weights(target)
    for wrong, why in ((torch.zeros(61, 8), "61, 8"), (torch.zeros(61, 32, dtype=torch.int8), "int8")):
        save_file(kept | {"lm_head.weight": wrong}, target / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{why}.*speculator.init = 'random'"):
            draft_of_day_0(target, NEAR)
    del kept["lm_head.weight"]
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight.*speculator\.init = 'random'"):
        draft_of_day_0(target, NEAR)
    assert draft_of_day_0(target, RANDOM).shape.draft_vocab_size == 16
