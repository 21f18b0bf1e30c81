"""The target's decoder layers, written for a few rows at a time.

Hugging Face's models are the reference and know every architecture; a step of theirs on a CPU spends about as long in
Python and small kernels as in the weights. ``FusedDecoder`` runs the layers of the Llama family (attention with rotary
embedding, grouped heads, RMS norms, a gated SiLU perceptron) with one product for queries, keys and values, one for
gate and up, and nothing in between that the arithmetic does not need. ``HubDecoder`` runs every other architecture.

Shape suffixes: T tokens of the batch, H hidden size, N query heads, M key/value heads, E head size, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from schemas.speculator.checkpoint import CheckpointError
from serving.engines.builtin.cuda_graphs import CapturedPasses
from serving.engines.builtin.kernels import Kind, RmsNorm, pack, replace_linears
from serving.engines.builtin.kv_cache import RaggedBatch, SlotCache, Tokens

ATTENTION = "aurora_slots"

_FUSED = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


class Consumed(NamedTuple):
    """What the target gives for the tokens of a batch."""

    features_TF: Tensor
    """Outputs of the captured layers after each token: low, middle, high, side by side."""
    last_TH: Tensor
    """Final hidden states, after the last norm."""


class Decoder(Protocol):
    """Runs tokens through the target's layers, into their slots of a cache."""

    def __call__(self, tokens_T: Tensor, batch: RaggedBatch, cache: SlotCache) -> Consumed:
        """Hidden states after each token."""


def decoder_for(model: Any, kind: Kind, capture: Sequence[int], positions: int) -> Decoder:
    """The fastest decoder that knows the model's architecture.

    Args:
        model: A causal language model of Hugging Face, fp32, on its device. Its linear layers may be taken apart.
        kind: Kernel of the linear layers.
        capture: Layers whose output is captured.
        positions: Longest request.
    """
    if type(model).__name__ in _FUSED and model.config.hidden_act == "silu" and _attends_to_all(model.config):
        fused = FusedDecoder(model, kind, capture, positions)
        return GraphedDecoder(fused) if model.device.type == "cuda" else fused
    replace_linears(model.get_decoder(), kind)
    return HubDecoder(model.get_decoder(), capture)


def head_size(config: Any) -> int:
    """E: values of an attention head of a model of this configuration."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def matrices(model: Any) -> list[Tensor]:
    """Every matrix [O, I] that a decoding step multiplies with, the output layer last."""
    linears = [module.weight for module in model.get_decoder().modules() if isinstance(module, nn.Linear)]
    return [*linears, model.get_output_embeddings().weight]


class _Layer(NamedTuple):
    """One decoder layer, its linear layers packed."""

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

    def __init__(self, model: Any, kind: Kind, capture: Sequence[int], positions: int) -> None:
        config, body = model.config, model.get_decoder()
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._size = head_size(config)
        self._embeddings_VH: Tensor = body.embed_tokens.weight
        self._norm = RmsNorm(body.norm.weight, config.rms_norm_eps)
        self._layers = [_packed(layer, kind, config.rms_norm_eps) for layer in body.layers]
        self._capture = tuple(capture)
        cos_PE, sin_PE = body.rotary_emb(
            self._embeddings_VH[:1], torch.arange(positions, device=self._embeddings_VH.device)[None]
        )
        self._cos_P1E: Tensor = cos_PE[0, :, None]
        # With the first half negated, `x * cos + roll(x) * sin` is the rotation in Llama's half-split layout.
        self._sin_P1E: Tensor = torch.cat([-sin_PE[0, :, : self._size // 2], sin_PE[0, :, self._size // 2 :]], -1)[
            :, None
        ]

    def __call__(self, tokens_T: Tensor, batch: Tokens, cache: SlotCache) -> Consumed:
        """Hidden states after each token."""
        x_TH = F.embedding(tokens_T, self._embeddings_VH)
        cos_T1E, sin_T1E = self._cos_P1E[batch.positions_T], self._sin_P1E[batch.positions_T]
        captured: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            x_TH = self._attend(number, layer, x_TH, (cos_T1E, sin_T1E), batch, cache)
            gate_up = layer.gate_up(layer.before_mlp(x_TH))
            gate, up = gate_up.chunk(2, dim=-1)
            x_TH = layer.down(F.silu(gate).mul_(up)).add_(x_TH)
            if number in self._capture:
                captured.append(x_TH)
        return Consumed(torch.cat(captured, dim=-1), self._norm(x_TH))

    def _attend(
        self,
        number: int,
        layer: _Layer,
        x_TH: Tensor,
        rotary: tuple[Tensor, Tensor],
        batch: Tokens,
        cache: SlotCache,
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


class GraphedDecoder:
    """A fused decoder on a GPU whose passes are captured as CUDA graphs, one for each size of batch."""

    def __init__(self, fused: FusedDecoder) -> None:
        self._fused = fused
        self._passes: CapturedPasses | None = None

    def __call__(self, tokens_T: Tensor, batch: RaggedBatch, cache: SlotCache) -> Consumed:
        """Hidden states after each token."""
        if self._passes is None:
            self._passes = CapturedPasses(lambda inputs, padded: self._fused(inputs[0], padded, cache), cache)
        found = self._passes.run(batch, (tokens_T,))
        return Consumed(*found) if found else self._fused(tokens_T, batch, cache)


class HubDecoder:
    """The layers of any architecture, as Hugging Face runs them, with attention over the slots."""

    def __init__(self, body: nn.Module, capture: Sequence[int]) -> None:
        self._body, self._capture = body, tuple(capture)
        self._captured: dict[int, Tensor] = {}
        for layer in self._capture:
            body.get_submodule(f"layers.{layer}").register_forward_hook(self._hook(layer))

    def __call__(self, tokens_T: Tensor, batch: RaggedBatch, cache: SlotCache) -> Consumed:
        """Hidden states after each token."""
        out = self._body(
            input_ids=tokens_T[None], position_ids=batch.positions_T[None], use_cache=False, ragged=batch, cache=cache
        )
        features = torch.cat([self._captured[layer] for layer in self._capture], dim=-1)
        return Consumed(features[0], out.last_hidden_state[0])

    def _hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook


def _packed(layer: Any, kind: Kind, eps: float) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        before_attention=RmsNorm(layer.input_layernorm.weight, eps),
        qkv=_joined(kind, [attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=RmsNorm(attention.q_norm.weight, eps) if hasattr(attention, "q_norm") else None,
        key_norm=RmsNorm(attention.k_norm.weight, eps) if hasattr(attention, "k_norm") else None,
        out=_joined(kind, [attention.o_proj]),
        before_mlp=RmsNorm(layer.post_attention_layernorm.weight, eps),
        gate_up=_joined(kind, [mlp.gate_proj, mlp.up_proj]),
        down=_joined(kind, [mlp.down_proj]),
    )


def _joined(kind: Kind, linears: Sequence[nn.Linear]) -> nn.Module:
    """Linear layers of the same input as one."""
    bias = torch.cat([layer.bias for layer in linears]) if linears[0].bias is not None else None
    return pack(kind, torch.cat([layer.weight for layer in linears]), bias)


def _attends_to_all(config: Any) -> bool:
    """Whether every layer sees all tokens before."""
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
    cache: SlotCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers' models call: queries [1, N, T, E] over the slots of the cache.

    Raises:
        CheckpointError: the model attends in a way that the cache does not compute.
    """
    plain_scaling = scaling is None or math.isclose(scaling, query.shape[-1] ** -0.5)
    if not plain_scaling or softcap is not None or (sliding_window or cache.positions) < cache.positions:
        raise CheckpointError(
            f"{type(module).__name__}: attention with a scale, a soft cap or a sliding window of its own is not served "
            "by this engine; choose another target.path"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return cache.attend(module.layer_idx, ragged, q, k, v)[None], None


AttentionInterface.register(ATTENTION, _attend)
