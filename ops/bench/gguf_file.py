"""A Llama in Hugging Face format as a GGUF file in fp16, for llama.cpp.

The file has no vocabulary: llama.cpp is given token ids and gives token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from schemas.speculator.checkpoint import target_fingerprint

_ARCHITECTURE = "LlamaForCausalLM"


class UnsupportedError(RuntimeError):
    """A target that this writer does not know."""


def ensure(folder: Path, cache: Path) -> Path:
    """The target of ``folder`` as a GGUF file in ``cache``, written on first use.

    Raises:
        UnsupportedError: the target is no plain Llama.
    """
    path = cache / f"{target_fingerprint(folder)}.f16.gguf"
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    plain = rope.get("rope_type", "default") == "default" and not config.get("attention_bias")
    if config.get("architectures") != [_ARCHITECTURE] or not plain:
        raise UnsupportedError(f"{folder}: only {_ARCHITECTURE} without rope scaling and bias is written as GGUF")
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    _write(unfinished, folder, config, float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    return unfinished.rename(path)


def _write(path: Path, folder: Path, config: dict[str, Any], rope_theta: float) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_theta)
    writer.add_rope_dimension_count(head_size)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in _weights(folder):
        module, _, kind = name.rpartition(".")
        if module.endswith(("q_proj", "k_proj")):
            weight = rotary_order(weight, heads if module.endswith("q_proj") else kv_heads)  # noqa: PLW2901
        writer.add_tensor(
            f"{names.get_name(module)}.{kind}", weight.astype(np.float32 if weight.ndim == 1 else np.float16)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rotary_order(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rows of a query or key projection in llama.cpp's order.

    Hugging Face turns value i of a head together with value i + size / 2, llama.cpp value 2 i with value 2 i + 1
    (``permute`` in its ``convert_hf_to_gguf.py``).
    """
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _weights(folder: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                yield name, file.get_tensor(name).float().numpy()
