"""The target: a Hugging Face causal language model run over ragged batches, with three of its layers captured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig

from schemas.speculator.checkpoint import CheckpointError, shape_for_target, target_fingerprint
from schemas.speculator.network import DraftShape
from serving.transformers.cache import RaggedBatch, SlotCache
from serving.transformers.kernels import pack_linears

log = structlog.get_logger()

ATTENTION = "aurora_slots"


class Consumed(NamedTuple):
    """What the target gives for the tokens of a batch."""

    features_TF: Tensor
    """Outputs of the captured layers after each token: low, middle, high, side by side."""
    last_TH: Tensor
    """Final hidden states, after the last norm."""


class Target:
    """The model that decides every token. Runs in float32 on one thread of its own; not thread-safe."""

    def __init__(self, folder: Path, draft_vocabulary: int, slots: int, positions: int) -> None:
        """Load the model.

        Raises:
            CheckpointError: no usable model in the folder, or one whose draft cannot be shaped.
        """
        self.fingerprint = target_fingerprint(folder)
        config = AutoConfig.from_pretrained(folder)
        self.shape: DraftShape = shape_for_target(config.to_dict(), draft_vocabulary)
        if positions > config.max_position_embeddings:
            raise CheckpointError(
                f"serve.max_tokens is {positions}, the target's context only {config.max_position_embeddings}"
            )
        self.eos_ids = _eos_ids(folder, config)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION)
        model.requires_grad_(requires_grad=False).eval()
        self.embeddings_VH: Tensor = model.get_input_embeddings().weight
        packed = pack_linears(model)
        self._body: nn.Module = model.get_decoder()
        self._lm_head: nn.Module = model.get_output_embeddings()
        self._captured: dict[int, Tensor] = {}
        for layer in self.shape.capture_layers:
            self._body.get_submodule(f"layers.{layer}").register_forward_hook(self._capture(layer))
        heads, size = self.shape.num_key_value_heads, self.shape.head_dim
        self.cache = SlotCache(config.num_hidden_layers, slots, heads, positions, size)
        log.info("target_loaded", folder=str(folder), fingerprint=self.fingerprint, packed_linears=packed)

    def consume(self, tokens_T: Tensor, batch: RaggedBatch) -> Consumed:
        """Run the tokens of a ragged batch through the model, into their slots of the cache."""
        out = self._body(
            input_ids=tokens_T[None],
            position_ids=batch.positions_T[None],
            use_cache=False,
            ragged=batch,
            cache=self.cache,
        )
        features = torch.cat([self._captured[layer] for layer in self.shape.capture_layers], dim=-1)
        return Consumed(features[0], out.last_hidden_state[0])

    def logits(self, last_TH: Tensor) -> Tensor:
        """Scores [T, V] of the next token."""
        scores: Tensor = self._lm_head(last_TH)
        return scores

    def _capture(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    ragged: RaggedBatch,
    cache: SlotCache,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers' models call: queries [1, N, T, E] over the slots of the cache."""
    return cache.attend(module.layer_idx, ragged, query[0], key[0], value[0])[None], None


def _eos_ids(folder: Path, config: Any) -> frozenset[int]:
    """Tokens that end an answer, from the generation settings where there are any, else from the configuration."""
    ids = config.eos_token_id
    if (folder / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id or ids
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, Iterable) else [ids])


AttentionInterface.register(ATTENTION, _attend)
