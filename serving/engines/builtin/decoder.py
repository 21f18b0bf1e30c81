"""The target's decoder layers, optimized for forwards over few tokens.

Hugging Face's models are the reference, but on a CPU one of their decode steps spends
about as long in Python and small kernels as in the weights. ``FusedDecoder`` runs the layers of the Llama family
(attention with rotary embedding, grouped heads, RMS norms, a gated SiLU MLP) with one product for queries, keys and
values, one for gate and up, and only the operations between that the arithmetic needs. ``TransformersDecoder`` runs
the other supported architectures.

Shape suffixes: T tokens of the batch, H hidden size, F features, N query heads, M key/value heads, E head size, G query
and key heads together, P positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from schemas.speculator.checkpoint import CheckpointError
from serving.engines.builtin.cuda_graphs import CudaGraphRunner
from serving.engines.builtin.kernels import RmsNorm, WeightDtype, pack_linear, replace_linears
from serving.engines.builtin.kv_cache import BatchLayout, KVCache, RaggedBatch

ATTENTION = "aurora_slots"

_FUSED = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
_OTHERS = frozenset(
    {
        "ArceeForCausalLM",
        "GemmaForCausalLM",
        "Glm4ForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "MixtralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
    }
)
ARCHITECTURES = _FUSED | _OTHERS
"""Supported architectures: tests compare each with Hugging Face's model. Others may scale or cap their logits."""


class HiddenStates(NamedTuple):
    """The target's hidden states for the tokens of a batch."""

    features_TF: Tensor
    """Outputs of the captured layers after each token: low, middle and high layer concatenated."""
    last_TH: Tensor
    """Hidden states after the final norm."""


class Decoder(Protocol):
    """Runs tokens through the target's layers and writes their keys and values to the KV cache."""

    def __call__(self, tokens_T: Tensor, batch: RaggedBatch, cache: KVCache) -> HiddenStates:
        """Return the hidden states after each token."""


def check_architecture(config: Mapping[str, Any]) -> None:
    """Check that the engine supports a target, by its ``config.json``.

    Raises:
        CheckpointError: its architecture is not supported, or its weights are quantized.
    """
    architecture = next(iter(config.get("architectures") or []), "none")
    if architecture not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(f"the built-in engine does not support the architecture {architecture}, only {supported}")
    if quantization := config.get("quantization_config"):
        raise CheckpointError(
            f"the weights are quantized ({quantization.get('quant_method')}); the built-in engine loads weights in "
            "float32, float16 or bfloat16"
        )


def build_decoder(model: Any, dtype: WeightDtype, capture_layers: Sequence[int], positions: int) -> Decoder:
    """Return the fastest decoder that supports the model's architecture.

    Args:
        model: A Hugging Face causal language model, fp32, on its device. The decoder may modify its linear layers.
        dtype: Weight dtype of the linear layers.
        capture_layers: Layers whose output is captured.
        positions: Maximum length of a sequence with its draft.

    Raises:
        CheckpointError: a layer attends to fewer tokens.
    """
    if not _has_full_attention(model.config) and (window := model.config.sliding_window or positions) < positions:
        raise CheckpointError(
            f"{type(model).__name__} attends to a window of {window} tokens, which the built-in engine supports only "
            f"for sequences that are no longer with their drafts, not {positions}; lower serve.max_model_len"
        )
    if type(model).__name__ in _FUSED and model.config.hidden_act == "silu" and _has_full_attention(model.config):
        fused = FusedDecoder(model, dtype, capture_layers, positions)
        return CudaGraphDecoder(fused) if model.device.type == "cuda" else fused
    replace_linears(model.get_decoder(), dtype)
    return TransformersDecoder(model.get_decoder(), capture_layers)


def read_head_size(config: Any) -> int:
    """Return E, the size of an attention head, of a model configuration."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def list_weight_matrices(model: Any) -> list[Tensor]:
    """Return every matrix [O, I] that a forward multiplies with, the output layer last."""
    linears = [module.weight for module in model.get_decoder().modules() if isinstance(module, nn.Linear)]
    return [*linears, model.get_output_embeddings().weight]


class _Layer(NamedTuple):
    """One decoder layer with packed linear layers."""

    before_attention: RmsNorm
    qkv: nn.Module
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    out: nn.Module
    before_mlp: RmsNorm
    gate_up: nn.Module
    down: nn.Module


class FusedDecoder:
    """The layers of a Llama-like model."""

    def __init__(self, model: Any, dtype: WeightDtype, capture_layers: Sequence[int], positions: int) -> None:
        config, body = model.config, model.get_decoder()
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._size = read_head_size(config)
        self._embeddings_VH: Tensor = body.embed_tokens.weight
        self._norm = RmsNorm(body.norm.weight, config.rms_norm_eps)
        self._layers = [_pack_layer(layer, dtype, config.rms_norm_eps) for layer in body.layers]
        self._capture_layers = tuple(capture_layers)
        cos_PE, sin_PE = body.rotary_emb(
            self._embeddings_VH[:1], torch.arange(positions, device=self._embeddings_VH.device)[None]
        )
        self._cos_P1E: Tensor = cos_PE[0, :, None]
        # With the first half negated, `x * cos + roll(x) * sin` is the rotation in Llama's half-split layout.
        self._sin_P1E: Tensor = torch.cat([-sin_PE[0, :, : self._size // 2], sin_PE[0, :, self._size // 2 :]], -1)[
            :, None
        ]

    def __call__(self, tokens_T: Tensor, batch: BatchLayout, cache: KVCache) -> HiddenStates:
        """Return the hidden states after each token."""
        x_TH = F.embedding(tokens_T, self._embeddings_VH)
        cos_T1E, sin_T1E = self._cos_P1E[batch.positions_T], self._sin_P1E[batch.positions_T]
        captured: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            x_TH = self._attend(number, layer, x_TH, (cos_T1E, sin_T1E), batch, cache)
            gate_up = layer.gate_up(layer.before_mlp(x_TH))
            gate, up = gate_up.chunk(2, dim=-1)
            x_TH = layer.down(F.silu(gate).mul_(up)).add_(x_TH)
            if number in self._capture_layers:
                captured.append(x_TH)
        return HiddenStates(torch.cat(captured, dim=-1), self._norm(x_TH))

    def _attend(
        self,
        number: int,
        layer: _Layer,
        x_TH: Tensor,
        rotary: tuple[Tensor, Tensor],
        batch: BatchLayout,
        cache: KVCache,
    ) -> Tensor:
        heads, kv_heads = self._heads, self._kv_heads
        qkv = layer.qkv(layer.before_attention(x_TH)).view(len(x_TH), heads + 2 * kv_heads, self._size)
        qk_TGE = qkv[:, : heads + kv_heads]
        if layer.query_norm is not None and layer.key_norm is not None:
            qk_TGE = torch.cat([layer.query_norm(qkv[:, :heads]), layer.key_norm(qk_TGE[:, heads:])], dim=1)
        cos_T1E, sin_T1E = rotary
        qk_TGE = torch.addcmul(qk_TGE * cos_T1E, qk_TGE.roll(self._size // 2, -1), sin_T1E)
        attended = cache.attend(number, batch, qk_TGE[:, :heads], qk_TGE[:, heads:], qkv[:, heads + kv_heads :])
        out: Tensor = layer.out(attended.flatten(1)).add_(x_TH)
        return out


class CudaGraphDecoder:
    """A fused decoder on a GPU that runs as CUDA graphs, one per batch size."""

    def __init__(self, fused: FusedDecoder) -> None:
        self._fused = fused
        self._graphs: CudaGraphRunner | None = None

    def __call__(self, tokens_T: Tensor, batch: RaggedBatch, cache: KVCache) -> HiddenStates:
        """Return the hidden states after each token."""
        if self._graphs is None:
            self._graphs = CudaGraphRunner(lambda inputs, padded: self._fused(inputs[0], padded, cache), cache)
        outputs = self._graphs.run(batch, (tokens_T,))
        return HiddenStates(*outputs) if outputs else self._fused(tokens_T, batch, cache)


class TransformersDecoder:
    """The layers of a supported architecture in Hugging Face's implementation, with attention over the KV cache."""

    def __init__(self, body: nn.Module, capture_layers: Sequence[int]) -> None:
        self._body, self._capture_layers = body, tuple(capture_layers)
        self._captured: dict[int, Tensor] = {}
        for layer in self._capture_layers:
            body.get_submodule(f"layers.{layer}").register_forward_hook(self._hook(layer))

    def __call__(self, tokens_T: Tensor, batch: RaggedBatch, cache: KVCache) -> HiddenStates:
        """Return the hidden states after each token."""
        out = self._body(
            input_ids=tokens_T[None], position_ids=batch.positions_T[None], use_cache=False, ragged=batch, cache=cache
        )
        features = torch.cat([self._captured[layer] for layer in self._capture_layers], dim=-1)
        return HiddenStates(features[0], out.last_hidden_state[0])

    def _hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook


def _pack_layer(layer: Any, dtype: WeightDtype, eps: float) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        before_attention=RmsNorm(layer.input_layernorm.weight, eps),
        qkv=_pack_joined(dtype, [attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=RmsNorm(attention.q_norm.weight, eps) if hasattr(attention, "q_norm") else None,
        key_norm=RmsNorm(attention.k_norm.weight, eps) if hasattr(attention, "k_norm") else None,
        out=_pack_joined(dtype, [attention.o_proj]),
        before_mlp=RmsNorm(layer.post_attention_layernorm.weight, eps),
        gate_up=_pack_joined(dtype, [mlp.gate_proj, mlp.up_proj]),
        down=_pack_joined(dtype, [mlp.down_proj]),
    )


def _pack_joined(dtype: WeightDtype, linears: Sequence[nn.Linear]) -> nn.Module:
    """Pack linear layers with the same input as one layer."""
    bias = torch.cat([layer.bias for layer in linears]) if linears[0].bias is not None else None
    return pack_linear(dtype, torch.cat([layer.weight for layer in linears]), bias)


def _has_full_attention(config: Any) -> bool:
    """Return whether every layer attends to all earlier tokens."""
    kinds = getattr(config, "layer_types", None)
    return set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None


def _attend(  # noqa: PLR0913 - the signature is transformers'
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    ragged: RaggedBatch,
    cache: KVCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attend over the KV cache; transformers calls it with this signature and shapes [1, N, T, E].

    Raises:
        CheckpointError: the KV cache does not support the model's attention.
    """
    plain_scaling = scaling is None or math.isclose(scaling, query.shape[-1] ** -0.5)
    if not plain_scaling or softcap is not None or (sliding_window or cache.positions) < cache.positions:
        raise CheckpointError(
            f"{type(module).__name__}: the built-in engine does not support attention with a custom scale, a soft cap "
            "or a sliding window; choose another target.path"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return cache.attend(module.layer_idx, ragged, q, k, v)[None], None


AttentionInterface.register(ATTENTION, _attend)
