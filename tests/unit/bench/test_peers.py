"""The target as a GGUF file has llama.cpp's names and order, and the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_target import write_tiny_target

from ops.bench.serving.peers import PeerAbsentError, provide_gguf, reorder_rotary_rows


def test_values_that_rotate_together_are_adjacent() -> None:
    heads, size = 2, 6
    rows = np.arange(heads * size)[:, None].repeat(3, axis=1)
    ordered = reorder_rotary_rows(rows, heads)[:, 0].tolist()
    assert ordered == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_file_contains_every_weight_of_the_target(tmp_path: Path) -> None:
    target = write_tiny_target(tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    reader = gguf.GGUFReader(provide_gguf(target, tmp_path / "cache"))
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    stored = load_file(target / "model.safetensors")
    assert len(written) == len(stored)
    assert np.array_equal(written["token_embd.weight"], stored["model.embed_tokens.weight"])
    assert np.array_equal(written["output.weight"], stored["lm_head.weight"])
    assert np.array_equal(written["blk.3.ffn_down.weight"], stored["model.layers.3.mlp.down_proj.weight"])
    query = reorder_rotary_rows(stored["model.layers.3.self_attn.q_proj.weight"], config["num_attention_heads"])
    key = reorder_rotary_rows(stored["model.layers.3.self_attn.k_proj.weight"], config["num_key_value_heads"])
    assert np.array_equal(written["blk.3.attn_q.weight"], query)
    assert np.array_equal(written["blk.3.attn_k.weight"], key)
    assert written["output_norm.weight"].dtype == np.float32, "llama.cpp takes vectors in fp32 only"


def test_the_file_is_written_once_for_a_target(tmp_path: Path) -> None:
    target = write_tiny_target(tmp_path / "target")
    path = provide_gguf(target, tmp_path / "cache")
    written = path.stat().st_mtime_ns
    assert provide_gguf(target, tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == written
    other = provide_gguf(write_tiny_target(tmp_path / "other", seed=1), tmp_path / "cache")
    assert other != path


def test_a_target_that_is_no_plain_llama_is_rejected(tmp_path: Path) -> None:
    target = write_tiny_target(tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(PeerAbsentError, match="only LlamaForCausalLM"):
        provide_gguf(target, tmp_path / "cache")
