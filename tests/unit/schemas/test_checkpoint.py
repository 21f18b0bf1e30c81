"""A damaged, foreign or wrong version is rejected; a valid version loads as it was written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.speculator.checkpoint import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    CheckpointError,
    default_capture_layers,
    line_name,
    read_checkpoint,
    shape_for_target,
    write_checkpoint,
)
from schemas.speculator.network import DraftShape, EagleDraft, random_draft

TARGET = "ab" * 16
SHAPE = DraftShape(8, 12, 4, 2, 4, 24, 10, 1e-6, 100.0, 64, (1, 3, 4))
NORMED = dataclasses.replace(SHAPE, variant="eagle3.1")

CONFIG_OF_TARGET = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
}


@pytest.fixture
def draft() -> EagleDraft:
    return made_of(SHAPE)


def made_of(shape: DraftShape) -> EagleDraft:
    made = random_draft(shape, 3)
    kept = torch.tensor([0, 1, 3, 4, 7, 8, 9, 15, 20, 23])
    made.d2t.copy_(kept - torch.arange(10))
    made.t2d.zero_()
    made.t2d[kept] = True
    return made


@pytest.fixture
def version(draft: EagleDraft, tmp_path: Path) -> Path:
    write_checkpoint(draft, tmp_path / "version", TARGET)
    return tmp_path / "version"


def line(draft: EagleDraft) -> str:
    return line_name(TARGET, draft.shape, draft.d2t)


def reseal(version: Path) -> None:
    """Update the hashes in the manifest, as the author of a wrong export would."""
    manifest = json.loads((version / MANIFEST).read_text())
    for name in manifest["sha256"]:
        manifest["sha256"][name] = hashlib.sha256((version / name).read_bytes()).hexdigest()
    (version / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("shape", [SHAPE, NORMED], ids=lambda shape: shape.variant)
def test_a_checkpoint_is_read_as_written_rounded_to_bf16(shape: DraftShape, tmp_path: Path) -> None:
    draft = made_of(shape)
    write_checkpoint(draft, tmp_path, TARGET)
    found = read_checkpoint(tmp_path, line(draft))
    for name, value in draft.state_dict().items():
        wanted = value.bfloat16().float() if value.is_floating_point() else value
        assert torch.equal(found.state_dict()[name], wanted), name
        assert found.state_dict()[name].dtype == (torch.float32 if value.is_floating_point() else value.dtype)
    assert found.shape == draft.shape


def test_float32_is_preserved_on_request(draft: EagleDraft, tmp_path: Path) -> None:
    write_checkpoint(draft, tmp_path, TARGET, torch.float32)
    found = read_checkpoint(tmp_path, line(draft))
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in draft.state_dict().items())


def test_names_and_shapes_match_the_serving_engines(version: Path) -> None:
    tensors = load_file(version / WEIGHTS)
    layer = "midlayer."
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "fc.weight": (8, 24),
        layer + "input_layernorm.weight": (8,),
        layer + "hidden_norm.weight": (8,),
        layer + "self_attn.q_proj.weight": (16, 16),
        layer + "self_attn.k_proj.weight": (8, 16),
        layer + "self_attn.v_proj.weight": (8, 16),
        layer + "self_attn.o_proj.weight": (8, 16),
        layer + "post_attention_layernorm.weight": (8,),
        layer + "mlp.gate_proj.weight": (12, 8),
        layer + "mlp.up_proj.weight": (12, 8),
        layer + "mlp.down_proj.weight": (8, 12),
        "norm.weight": (8,),
        "lm_head.weight": (10, 8),
        "d2t": (10,),
        "t2d": (24,),
    }
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    config = json.loads((version / CONFIG).read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["vocab_size"], config["draft_vocab_size"], config["num_hidden_layers"]) == (24, 10, 1)
    assert config["eagle_config"] == {
        "use_aux_hidden_state": True,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 4],
    }
    assert config["tie_word_embeddings"] is False
    assert not {"fc_norm", "norm_output"} & config.keys()


def test_eagle_3_1_adds_a_norm_for_each_captured_layer_and_two_keys(draft: EagleDraft, tmp_path: Path) -> None:
    write_checkpoint(made_of(NORMED), tmp_path, TARGET)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    added = {name: tuple(t.shape) for name, t in tensors.items() if name not in draft.state_dict()}
    assert added == {"fc_norm.0.weight": (8,), "fc_norm.1.weight": (8,), "fc_norm.2.weight": (8,)}
    assert (config["fc_norm"], config["norm_output"]) == (True, True)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]


def cut_weights(version: Path) -> None:
    path = version / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(version: Path) -> None:
    path = version / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def add_pickle(version: Path) -> None:
    (version / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": [0.0]}))


def remove(name: str) -> Callable[[Path], None]:
    return lambda version: (version / name).unlink()


def garble(name: str) -> Callable[[Path], None]:
    return lambda version: (version / name).write_text("{") and None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_weights, "SHA-256"),
        (flip_a_bit, "SHA-256"),
        (add_pickle, "unknown files: pytorch_model.bin"),
        (remove(WEIGHTS), f"{WEIGHTS}: missing"),
        (remove(CONFIG), f"{CONFIG}: missing"),
        (remove(MANIFEST), f"{MANIFEST}: missing"),
        (garble(MANIFEST), f"{MANIFEST}: not valid JSON"),
    ],
)
def test_altered_files_are_rejected(
    draft: EagleDraft, version: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(version)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(version, line(draft))


def edited(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(version: Path) -> None:
        tensors = load_file(version / WEIGHTS)
        edit(tensors)
        save_file(tensors, version / WEIGHTS)

    return apply


def to_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"][3] = torch.nan


def swap_d2t(tensors: dict[str, torch.Tensor]) -> None:
    tensors["d2t"][:2] = torch.tensor([1, -1])


def widen_t2d(tensors: dict[str, torch.Tensor]) -> None:
    tensors["t2d"][2] = True


def config_edit(**values: Any) -> Callable[[Path], None]:
    def apply(version: Path) -> None:
        config = json.loads((version / CONFIG).read_text())
        (version / CONFIG).write_text(json.dumps(config | values))

    return apply


def not_safetensors(version: Path) -> None:
    (version / WEIGHTS).write_bytes(b"\x80\x04" * 100)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (edited(lambda t: t.pop("fc.weight")), "missing tensors: fc.weight"),
        (edited(lambda t: t.update({"layers.0.x": torch.zeros(1)})), "unknown tensors: layers.0.x"),
        (edited(lambda t: t.update({"norm.weight": torch.zeros(7)})), r"norm.weight: shape \[7\], expected \[8\]"),
        (edited(lambda t: t.update({"d2t": t["d2t"].int()})), "d2t: type torch.int32"),
        (edited(lambda t: t.update({"norm.weight": torch.ones(8).int()})), "norm.weight: type torch.int32"),
        (edited(to_nan), "norm.weight: values are not finite"),
        (edited(swap_d2t), "ascending"),
        (edited(widen_t2d), "t2d"),
        (config_edit(draft_vocab_size=None), "draft_vocab_size: .* integer"),
        (config_edit(hidden_size="8"), "hidden_size: .* integer"),
        (config_edit(num_attention_heads=0), "not positive"),
        (config_edit(draft_vocab_size=10**9), r"shape \[10\], expected \[1000000000\]"),
        (config_edit(intermediate_size=2**40), "too large"),
        (config_edit(eagle_config={}), "missing or malformed"),
        (config_edit(vocab_size=25), r"t2d: shape"),
        (config_edit(tie_word_embeddings=True), "tie_word_embeddings"),
        (config_edit(rope_theta=5.0), "rope_parameters"),
        (config_edit(rope_parameters=5), "missing or malformed"),
        (config_edit(rope_parameters={"rope_type": "longrope"}), "longrope"),
        (config_edit(rope_parameters={"rope_type": ["yarn"]}), "missing or malformed"),
        (config_edit(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}), "rope_scaling"),
        (config_edit(extra=1), "extra"),
        (config_edit(fc_norm=True), "unexpected values for norm_output"),
        (config_edit(fc_norm=True, norm_output=True), "missing tensors: fc_norm.0.weight"),
        (config_edit(norm_output=True), "unexpected values for norm_output"),
        (edited(lambda t: t.update({"fc_norm.0.weight": torch.ones(8)})), "unknown tensors: fc_norm.0.weight"),
        (not_safetensors, "not safetensors"),
    ],
)
def test_wrong_exports_are_rejected_although_their_hashes_match(
    draft: EagleDraft, version: Path, wrong: Callable[[Path], None], says: str
) -> None:
    wrong(version)
    reseal(version)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(version, line(draft))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (edited(lambda t: t.pop("fc_norm.1.weight")), "missing tensors: fc_norm.1.weight"),
        (edited(lambda t: t.update({"fc_norm.2.weight": torch.ones(24)})), r"fc_norm.2.weight: shape \[24\]"),
        (config_edit(norm_output=False), "unexpected values for norm_output"),
        (config_edit(fc_norm=False), "unexpected values for fc_norm, norm_output"),
    ],
)
def test_wrong_exports_of_eagle_3_1_are_rejected(wrong: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    draft = made_of(NORMED)
    write_checkpoint(draft, tmp_path, TARGET)
    wrong(tmp_path)
    reseal(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(tmp_path, line(draft))


def test_another_line_is_rejected_by_name(draft: EagleDraft, version: Path) -> None:
    with pytest.raises(CheckpointError, match=f"line {line(draft)}, expected line other"):
        read_checkpoint(version, "other")


def test_a_manifest_with_a_forged_line_is_rejected(draft: EagleDraft, version: Path) -> None:
    manifest = json.loads((version / MANIFEST).read_text())
    (version / MANIFEST).write_text(json.dumps(manifest | {"line": "forged"}))
    with pytest.raises(CheckpointError, match="line forged is of another target"):
        read_checkpoint(version, "forged")


def test_a_version_of_a_line_may_draft_from_other_tokens(draft: EagleDraft, tmp_path: Path) -> None:
    shape = draft.shape
    other = random_draft(shape, 1, torch.arange(shape.draft_vocab_size) * 2)
    assert line(other) != line(draft)
    assert write_checkpoint(other, tmp_path, TARGET, line=line(draft)).line == line(draft)
    assert torch.equal(read_checkpoint(tmp_path, line(draft)).t2d, other.t2d)
    with pytest.raises(CheckpointError, match=f"expected line {line(other)}"):
        read_checkpoint(tmp_path, line(other))


def test_values_that_are_not_finite_are_not_written(draft: EagleDraft, tmp_path: Path) -> None:
    with torch.no_grad():
        draft.fc.weight[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match=r"fc\.weight"):
        write_checkpoint(draft, tmp_path, TARGET)


def test_the_line_depends_on_everything_that_makes_versions_incompatible(draft: EagleDraft) -> None:
    lines = {
        line(draft),
        line_name("cd" * 16, draft.shape, draft.d2t),
        line_name(TARGET, draft.shape, draft.d2t.flip(0)),
        line_name(TARGET, dataclasses.replace(draft.shape, capture_layers=(1, 2, 4)), draft.d2t),
        line_name(TARGET, dataclasses.replace(draft.shape, intermediate_size=16), draft.d2t),
        line_name(TARGET, NORMED, draft.d2t),
    }
    assert len(lines) == 6


def test_the_line_of_a_plain_draft_is_stable() -> None:
    d2t = torch.zeros(8192, dtype=torch.int64)
    assert line_name(TARGET, shape_for_target(CONFIG_OF_TARGET, 8192), d2t) == "abababababab-6e564b6e7074"


def test_the_shape_follows_the_target() -> None:
    shape = shape_for_target(CONFIG_OF_TARGET, 8192)
    assert (shape.hidden_size, shape.draft_vocab_size, shape.feature_width) == (576, 8192, 1728)
    assert (shape.rope_theta, shape.capture_layers) == (100000.0, (1, 14, 26))
    assert default_capture_layers(32) == (1, 15, 28)
    assert (shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim) == (9, 3, 64)
    assert shape_for_target(CONFIG_OF_TARGET, 10**6).draft_vocab_size == 49152
    older = {k: v for k, v in CONFIG_OF_TARGET.items() if k not in ("num_key_value_heads", "head_dim")}
    assert shape_for_target(older, 8192) == dataclasses.replace(shape, num_key_value_heads=9)


def test_the_width_of_the_mlp_is_the_targets_by_default() -> None:
    assert shape_for_target(CONFIG_OF_TARGET, 8192).intermediate_size == 1536
    assert shape_for_target(CONFIG_OF_TARGET, 8192, intermediate_size=512).intermediate_size == 512


def test_the_number_of_key_and_value_heads_is_the_targets_by_default() -> None:
    assert shape_for_target(CONFIG_OF_TARGET, 8192).num_key_value_heads == 3
    assert shape_for_target(CONFIG_OF_TARGET, 8192, num_key_value_heads=9).num_key_value_heads == 9
    with pytest.raises(CheckpointError, match=r"speculator\.num_key_value_heads 4 .* 9 attention heads"):
        shape_for_target(CONFIG_OF_TARGET, 8192, num_key_value_heads=4)


def test_the_error_for_an_incomplete_config_names_the_missing_size() -> None:
    config = {k: v for k, v in CONFIG_OF_TARGET.items() if k != "rms_norm_eps"}
    with pytest.raises(CheckpointError, match="lacks rms_norm_eps"):
        shape_for_target(config, 8192)


def test_a_random_draft_is_the_same_in_every_process() -> None:
    one, other = random_draft(SHAPE, 0), random_draft(SHAPE, 0)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert not torch.equal(one.fc.weight, random_draft(SHAPE, 1).fc.weight)
