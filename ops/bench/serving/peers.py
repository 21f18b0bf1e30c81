"""Other engines on the same weights: transformers' ``generate``, plain and with prompt lookup, and llama.cpp.

llama.cpp reads the target from a GGUF file in fp16 that is written here, without a vocabulary: it takes and returns
token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from ops.bench.harness import run_alternating
from schemas.speculator.target_fingerprint import target_fingerprint

DTYPES = ("float32", "bfloat16", "float16")
LOOKUP_TOKENS = 10
"""Draft tokens of prompt lookup, as its authors recommend (transformers' documentation of ``generate``)."""
_LLAMA_LOOKUP_TOKENS = 2
"""Draft tokens of llama.cpp's prompt lookup, as its documentation recommends for a CPU."""

_ARCHITECTURE = "LlamaForCausalLM"
_TRIED_TOKENS = 8
_TRIES = 2
_CONTEXT = 2048


class PeerAbsentError(RuntimeError):
    """This engine cannot run here; the message is the reason."""


class Generate:
    """transformers' ``generate`` on the target: greedy, one prompt at a time."""

    def __init__(self, folder: Path, dtype: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self.dtype, self._device = dtype, device
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        self._model = model.to(device).eval()

    @classmethod
    def fastest(cls, folder: Path, prompt: tuple[int, ...], device: torch.device) -> tuple[Generate, dict[str, float]]:
        """Return the model in the dtype that is fastest on this machine, and tokens per second in each."""
        models = {dtype: cls(folder, dtype, device) for dtype in DTYPES}
        for model in models.values():
            model.generate(prompt, _TRIED_TOKENS)
        arms = {
            dtype: lambda _, model=model: len(model.generate(prompt, _TRIED_TOKENS)) for dtype, model in models.items()
        }
        rates = {dtype: max(rate.clock.values) for dtype, rate in run_alternating(arms, _TRIES).items()}
        return models[max(rates, key=lambda dtype: rates[dtype])], rates

    def generate(self, prompt: tuple[int, ...], max_tokens: int, *, lookup: bool = False) -> tuple[int, ...]:
        """Return the output tokens of one prompt, with or without prompt lookup."""
        ids = torch.tensor([prompt], device=self._device)
        arguments: dict[str, Any] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS} if lookup else {}
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, **arguments
            )
        return tuple(out[0, len(prompt) :].tolist())


class LlamaCpp:
    """llama.cpp on the same weights in fp16: greedy, one prompt at a time."""

    def __init__(
        self, folder: Path, cache: Path, threads: int, end_tokens: Iterable[int], *, lookup: bool = False
    ) -> None:
        """Load the model; the first time it is written as GGUF into ``cache``.

        Args:
            folder: The target.
            cache: For the GGUF file.
            threads: Of the processor.
            end_tokens: Tokens that end an output.
            lookup: Whether it drafts by prompt lookup, its own speculation without a draft model.

        Raises:
            PeerAbsentError: llama-cpp-python is not installed, or the target is no plain Llama.
        """
        try:
            import llama_cpp
            from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
        except ImportError as error:
            raise PeerAbsentError(f"{error}; `make peers` builds llama-cpp-python") from error
        self._end_tokens = frozenset(end_tokens)
        self.version = str(llama_cpp.__version__)
        file = str(provide_gguf(folder, cache))
        draft = LlamaPromptLookupDecoding(num_pred_tokens=_LLAMA_LOOKUP_TOKENS) if lookup else None
        self._llama = llama_cpp.Llama(
            file, n_ctx=_CONTEXT, n_threads=threads, n_threads_batch=threads, draft_model=draft, verbose=False
        )

    def generate(self, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """Return the output tokens of one prompt."""
        self._llama.reset()
        tokens: list[int] = []
        for token in self._llama.generate(list(prompt), temp=0.0, top_k=1):
            tokens.append(token)
            if token in self._end_tokens or len(tokens) >= max_tokens:
                break
        return tuple(tokens)


def provide_gguf(folder: Path, cache: Path) -> Path:
    """Return the target in ``folder`` as a GGUF file in ``cache``, written on first use.

    Raises:
        PeerAbsentError: the target is no plain Llama.
    """
    path = cache / f"{target_fingerprint(folder)}.f16.gguf"
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    plain = rope.get("rope_type", "default") == "default" and not config.get("attention_bias")
    if config.get("architectures") != [_ARCHITECTURE] or not plain:
        raise PeerAbsentError(f"{folder}: only {_ARCHITECTURE} without rope scaling and bias is written as GGUF")
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    _write_gguf(unfinished, folder, config, float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    return unfinished.rename(path)


def _write_gguf(path: Path, folder: Path, config: dict[str, Any], rope_theta: float) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_theta)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                module, _, kind = name.rpartition(".")
                weight = file.get_tensor(name).float().numpy()
                if module.endswith(("q_proj", "k_proj")):
                    weight = reorder_rotary_rows(weight, heads if module.endswith("q_proj") else kv_heads)
                dtype = np.float32 if weight.ndim == 1 else np.float16
                writer.add_tensor(f"{names.get_name(module)}.{kind}", weight.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reorder_rotary_rows(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Return the rows of a query or key projection in llama.cpp's order.

    Hugging Face rotates value i of a head together with value i + size / 2, llama.cpp value 2 i with value 2 i + 1
    (``permute`` in its ``convert_hf_to_gguf.py``).
    """
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
