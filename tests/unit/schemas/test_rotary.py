"""The draft's rotary positions against those of transformers, for every supported scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from schemas.speculator.checkpoint import (
    CONFIG,
    CheckpointError,
    line_name,
    read_checkpoint,
    shape_for_target,
    write_checkpoint,
)
from schemas.speculator.network import random_draft
from schemas.speculator.rotary import Linear, Llama3, Yarn, rotary_angles

TARGET: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 8,
    "vocab_size": 24,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 5e5,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED: list[tuple[dict[str, Any], type]] = [
    ({"rope_type": "linear", "factor": 4}, Linear),
    ({"type": "linear", "factor": 2.5}, Linear),
    ({**LLAMA3, "original_max_position_embeddings": 512}, Llama3),
    (LLAMA3, Llama3),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, Yarn),
    ({"rope_type": "yarn", "factor": 16.0, "beta_fast": 8, "beta_slow": 2, "attention_factor": None}, Yarn),
]


@pytest.mark.parametrize(("scaling", "kind"), SCALED)
def test_angles_equal_those_of_transformers_for_the_written_config(
    scaling: dict[str, Any], kind: type, tmp_path: Path
) -> None:
    shape = shape_for_target(TARGET | {"rope_scaling": scaling}, 16)
    assert isinstance(shape.rope_scaling, kind)
    write_checkpoint(random_draft(shape, 0), tmp_path, "ab" * 16)
    config = LlamaConfig.from_dict(json.loads((tmp_path / CONFIG).read_text()))
    assert config.rope_parameters["rope_theta"] == TARGET["rope_theta"]
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, None)
    positions = torch.tensor([[0, 1, 17, 600, 4095]])
    angles = (positions[0, :, None].float() * frequencies).repeat(1, 2)
    cos, sin = rotary_angles(positions, shape.head_dim, shape.rope_theta, shape.rope_scaling)
    torch.testing.assert_close(cos[0, 0], angles.cos() * magnitude, rtol=0, atol=2e-3)
    torch.testing.assert_close(sin[0, 0], angles.sin() * magnitude, rtol=0, atol=2e-3)
    near = positions[0] < 100
    torch.testing.assert_close(cos[0, 0, near], (angles.cos() * magnitude)[near], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", [scaling for scaling, _ in SCALED])
def test_a_scaling_is_read_as_written_and_makes_a_line_of_its_own(scaling: dict[str, Any], tmp_path: Path) -> None:
    shape = shape_for_target(TARGET | {"rope_scaling": scaling}, 16)
    draft = random_draft(shape, 0)
    line = write_checkpoint(draft, tmp_path, "ab" * 16).line
    assert read_checkpoint(tmp_path, line).shape == shape
    assert line != line_name("ab" * 16, shape_for_target(TARGET, 16), draft.d2t)


def test_rope_scaling_and_rope_parameters_give_the_same_scaling() -> None:
    scaling = SCALED[2][0]
    apart = shape_for_target(TARGET | {"rope_scaling": scaling}, 16)
    joined = {key: value for key, value in TARGET.items() if key != "rope_theta"}
    together = shape_for_target(joined | {"rope_parameters": {**scaling, "rope_theta": 5e5}}, 16)
    assert apart == together


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"rope_type": "longrope"}, "rope_type 'longrope' is not supported .*: 'default', 'linear', 'llama3', 'yarn'"),
        ({"rope_type": "linear"}, "'linear': factor: Field required"),
        ({"rope_type": "linear", "factor": 0}, "factor: Input should be greater than 0"),
        ({"rope_type": "linear", "factor": "4"}, "factor: Input should be a valid number"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}, "'yarn': mscale: Unexpected keyword"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor"),
    ],
)
def test_an_unsupported_scaling_is_rejected(scaling: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        shape_for_target(TARGET | {"rope_scaling": scaling}, 16)
