"""The target: a Hugging Face causal language model run over ragged batches, with three of its layers captured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import structlog
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import DraftShape
from serving.engines.builtin.decoder import ATTENTION, Consumed, decoder_for, head_size, matrices
from serving.engines.builtin.kernels import KernelError, Kind, choose, pack
from serving.engines.builtin.kv_cache import CPU, RaggedBatch, SlotCache

log = structlog.get_logger()


class Target:
    """The model that decides every token. Runs on one thread of its own; not thread-safe."""

    def __init__(
        self,
        folder: Path,
        shape: DraftShape,
        slots: int,
        positions: int,
        *,
        drafted: int = 0,
        weights: Kind | Literal["auto"] = "auto",
        device: torch.device = CPU,
    ) -> None:
        """Load the model and choose its kernels.

        Args:
            folder: The model in Hugging Face format.
            shape: Of the draft that is to be served: it says which layers are captured.
            slots: Requests at a time.
            positions: Longest request, prompt and answer together.
            drafted: Tokens of a request that are verified at most in one pass.
            weights: Kernel of the matrices.
            device: Where it computes.

        Raises:
            CheckpointError: no usable model in the folder.
        """
        config = AutoConfig.from_pretrained(folder)
        self.shape = shape
        if positions > config.max_position_embeddings:
            raise CheckpointError(
                f"serve.max_model_len is {positions}, the target's context only {config.max_position_embeddings}"
            )
        self.eos_ids = _eos_ids(folder, config)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION)
        model.requires_grad_(requires_grad=False).eval().to(device)
        self.device = device
        self.embeddings_VH: Tensor = model.get_input_embeddings().weight
        parameters = matrices(model)
        try:
            self.kind: Kind = choose(weights, parameters)
            output = model.get_output_embeddings()
            self._lm_head = pack(self.kind, output.weight, output.bias)
            self._decoder = decoder_for(model, self.kind, self.shape.capture_layers, positions + drafted + 1)
        except KernelError as error:
            raise CheckpointError(str(error)) from error
        self.cache = _cache(config, slots, positions + drafted + 1, device)
        log.info(
            "target_loaded",
            folder=str(folder),
            weights=self.kind,
            device=str(device),
            decoder=type(self._decoder).__name__,
        )

    def consume(self, tokens_T: Tensor, batch: RaggedBatch) -> Consumed:
        """Run the tokens of a ragged batch through the model, into their slots of the cache."""
        return self._decoder(tokens_T, batch, self.cache)

    def logits(self, last_TH: Tensor) -> Tensor:
        """Scores [T, V] of the next token."""
        scores: Tensor = self._lm_head(last_TH)
        return scores


def _cache(config: Any, slots: int, positions: int, device: torch.device) -> SlotCache:
    """Room for the keys and values of a model of this configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return SlotCache(config.num_hidden_layers, slots, heads, positions, head_size(config), device)


def _eos_ids(folder: Path, config: Any) -> frozenset[int]:
    """Tokens that end an answer, from the generation settings where there are any, else from the configuration."""
    ids = config.eos_token_id
    if (folder / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id or ids
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, Iterable) else [ids])
