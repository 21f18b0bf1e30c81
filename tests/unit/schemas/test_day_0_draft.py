"""The day-0 draft of a line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_target import write_tiny_target

from schemas.settings import Speculator, Target
from schemas.speculator.checkpoint import CheckpointError, line_name, round_weights
from schemas.speculator.day_0_draft import create_day_0_draft, read_embeddings, read_line
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import Verifier
from schemas.speculator.network import EagleDraft, random_draft

NEAR = Speculator(draft_vocab_size=16)
RANDOM = Speculator(draft_vocab_size=16, init="random")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_tiny_target(tmp_path / "target")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def similarity(draft: EagleDraft) -> float:
    """Cosine similarity of the highest captured layer and the output of ``fuse``, if the other layers are zero."""
    hidden = torch.randn(1, 9, draft.shape.hidden_size, generator=torch.Generator().manual_seed(0))
    others = torch.zeros(1, 9, 2 * draft.shape.hidden_size)
    fused = draft.fuse(torch.cat([others, hidden], dim=-1))
    return torch.cosine_similarity(fused, hidden, dim=-1).min().item()


def test_the_draft_has_the_targets_output_layer_and_passes_the_highest_layer_through(target: Path) -> None:
    near, drawn = create_day_0_draft(target, NEAR), create_day_0_draft(target, RANDOM)
    assert torch.equal(near.lm_head.weight, weights(target)["lm_head.weight"].float()[near.t2d])
    assert similarity(near) > 0.9
    assert similarity(drawn) < 0.9
    assert not torch.equal(drawn.lm_head.weight, near.lm_head.weight)
    assert torch.equal(drawn.midlayer.mlp.up_proj.weight, near.midlayer.mlp.up_proj.weight)


def test_tied_embeddings_are_the_output_layer(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    draft = create_day_0_draft(target, NEAR)
    assert torch.equal(draft.lm_head.weight, read_embeddings(target).float()[draft.t2d])


def test_the_initial_weights_are_not_part_of_the_line(target: Path) -> None:
    settings = Target(path=str(target))
    assert read_line(settings, NEAR).name == read_line(settings, RANDOM).name


def test_the_error_for_an_unusable_output_layer_names_the_setting_to_change(target: Path) -> None:
    kept = weights(target)
    for wrong, why in ((torch.zeros(61, 8), "61, 8"), (torch.zeros(61, 32, dtype=torch.int8), "int8")):
        save_file(kept | {"lm_head.weight": wrong}, target / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{why}.*speculator.init = 'random'"):
            create_day_0_draft(target, NEAR)
    del kept["lm_head.weight"]
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor lm_head\.weight.*speculator\.init = 'random'"):
        create_day_0_draft(target, NEAR)
    assert create_day_0_draft(target, RANDOM).shape.draft_vocab_size == 16


def test_a_line_begins_with_a_trained_draft_of_any_shape(target: Path, tmp_path: Path) -> None:
    shape = replace(create_day_0_draft(target, NEAR).shape, intermediate_size=7, capture_layers=(0, 2, 6))
    trained = round_weights(random_draft(shape, 5, torch.arange(16) * 3))
    write_draft_folder(trained, tmp_path / "theirs", "speculators", Verifier("target", (), 3))
    begun = RANDOM.model_copy(update={"day_0_folder": str(tmp_path / "theirs"), "draft_vocab_file": "nowhere"})
    line = read_line(Target(path=str(target)), begun)
    assert line.day_0_draft.shape == shape
    assert line.name == line_name(line.target, shape, trained.d2t)
    assert torch.equal(line.day_0_draft.fc.weight, trained.fc.weight)
    assert (begun.day_0, RANDOM.day_0) == ("day-0-theirs", "day-0-random-0")
    other = create_day_0_draft(target, begun, torch.arange(16) + 40)
    assert other.shape == shape
    assert other.t2d.nonzero().flatten().tolist() == list(range(40, 56))


def test_the_error_for_an_unusable_trained_draft_names_the_setting(target: Path, tmp_path: Path) -> None:
    begun = NEAR.model_copy(update={"day_0_folder": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError, match=r"speculator\.day_0_folder: .*nowhere: no readable config\.json"):
        create_day_0_draft(target, begun)
