"""The part of the target that recomputes features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_target import VOCABULARY, write_tiny_target
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from schemas.device import select_device
from trainer.data.target import FrozenTarget

LAYERS = (1, 3, 4)


def write_qwen3(folder: Path) -> Path:
    """Save a model whose configuration lists the type of each layer."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    assert len(config.layer_types) == 8
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("write", [write_tiny_target, write_qwen3])
def test_states_of_the_loaded_layers_equal_those_of_the_whole_target(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, device = write(tmp_path), select_device("auto", "train.device")
    frozen = FrozenTarget(folder, LAYERS, device)
    tokens_n = torch.randint(0, VOCABULARY, (23,), generator=torch.Generator().manual_seed(0))
    found_nF = frozen.compute_states(tokens_n)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = whole(tokens_n[None], output_hidden_states=True).hidden_states
    expected_nF = torch.cat([states[layer + 1][0] for layer in LAYERS], dim=-1)
    assert (found_nF.dtype, found_nF.device) == (torch.bfloat16, torch.device("cpu"))
    torch.testing.assert_close(found_nF.float(), expected_nF, rtol=2**-7, atol=1e-4)

    held = dict(frozen._body.named_parameters())
    assert {int(name.split(".")[1]) for name in held if name.startswith("layers.")} == set(range(max(LAYERS) + 1))
    assert {name for name in held if not name.startswith("layers.")} == {"embed_tokens.weight", "norm.weight"}
    assert {value.device.type for value in held.values()} == {device.type}
