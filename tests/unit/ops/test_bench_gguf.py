"""The target as a GGUF file: llama.cpp's names and order, and not a weight altered."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_target import write_tiny_target

from ops.bench.gguf_file import UnsupportedError, ensure, rotary_order


def test_values_that_rotate_together_become_neighbours() -> None:
    heads, size = 2, 6
    rows = np.arange(heads * size)[:, None].repeat(3, axis=1)
    ordered = rotary_order(rows, heads)[:, 0].tolist()
    assert ordered == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_file_holds_every_weight_of_the_target(tmp_path: Path) -> None:
    target = write_tiny_target(tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    reader = gguf.GGUFReader(ensure(target, tmp_path / "cache"))
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    stored = load_file(target / "model.safetensors")
    assert len(written) == len(stored)
    assert np.array_equal(written["token_embd.weight"], stored["model.embed_tokens.weight"])
    assert np.array_equal(written["output.weight"], stored["lm_head.weight"])
    assert np.array_equal(written["blk.3.ffn_down.weight"], stored["model.layers.3.mlp.down_proj.weight"])
    query = rotary_order(stored["model.layers.3.self_attn.q_proj.weight"], config["num_attention_heads"])
    key = rotary_order(stored["model.layers.3.self_attn.k_proj.weight"], config["num_key_value_heads"])
    assert np.array_equal(written["blk.3.attn_q.weight"], query)
    assert np.array_equal(written["blk.3.attn_k.weight"], key)
    assert written["output_norm.weight"].dtype == np.float32, "llama.cpp takes vectors in fp32 only"


def test_the_file_is_written_once_for_a_target(tmp_path: Path) -> None:
    target = write_tiny_target(tmp_path / "target")
    path = ensure(target, tmp_path / "cache")
    written = path.stat().st_mtime_ns
    assert ensure(target, tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == written
    other = ensure(write_tiny_target(tmp_path / "other", seed=1), tmp_path / "cache")
    assert other != path


def test_a_target_that_the_writer_does_not_know_is_refused(tmp_path: Path) -> None:
    target = write_tiny_target(tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(UnsupportedError, match="only LlamaForCausalLM"):
        ensure(target, tmp_path / "cache")
