"""The target: a Hugging Face causal language model over ragged batches, with the outputs of three layers captured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import structlog
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from schemas.errors import describe_error
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import DraftShape
from serving.engines.builtin.decoder import (
    ATTENTION,
    HiddenStates,
    build_decoder,
    list_weight_matrices,
    read_head_size,
)
from serving.engines.builtin.kernels import KernelError, WeightDtype, choose_weight_dtype, pack_linear
from serving.engines.builtin.kv_cache import CPU, KVCache, RaggedBatch

log = structlog.get_logger()


class Target:
    """The model that chooses every output token. Not thread-safe."""

    def __init__(
        self,
        folder: Path,
        shape: DraftShape,
        slots: int,
        positions: int,
        *,
        draft_nodes: int = 0,
        weight_dtype: WeightDtype | Literal["auto"] = "auto",
        device: torch.device = CPU,
    ) -> None:
        """Load the model and choose its kernels.

        Args:
            folder: The model in Hugging Face format.
            shape: Shape of the draft to serve; it names the layers to capture.
            slots: Maximum number of running sequences.
            positions: Maximum length of a sequence, prompt and output together.
            draft_nodes: Maximum number of draft tokens per sequence in one forward.
            weight_dtype: Weight dtype of the matrices; ``auto`` selects the fastest exact one.
            device: Device to compute on.

        Raises:
            CheckpointError: the folder holds no usable model.
        """
        with _explain_failure():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.shape = shape
        if positions > config.max_position_embeddings:
            raise CheckpointError(
                f"serve.max_model_len is {positions}, but the target's context is {config.max_position_embeddings}"
            )
        self.eos_ids = _read_eos_ids(folder, config)
        model = _load_model(folder)
        model.requires_grad_(requires_grad=False).eval().to(device)
        self.device = device
        self.embeddings_VH: Tensor = model.get_input_embeddings().weight
        # Beside its output, a sequence holds the root and the draft.
        positions += draft_nodes + 1
        try:
            self.weight_dtype = choose_weight_dtype(weight_dtype, list_weight_matrices(model))
            output = model.get_output_embeddings()
            self._lm_head = pack_linear(self.weight_dtype, output.weight, output.bias)
            self._decoder = build_decoder(model, self.weight_dtype, shape.capture_layers, positions)
        except KernelError as error:
            raise CheckpointError(str(error)) from error
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.cache = KVCache(config.num_hidden_layers, slots, kv_heads, positions, read_head_size(config), device)
        log.info(
            "target_loaded",
            folder=str(folder),
            weight_dtype=self.weight_dtype,
            device=str(device),
            decoder=type(self._decoder).__name__,
        )

    def forward(self, tokens_T: Tensor, batch: RaggedBatch) -> HiddenStates:
        """Run the tokens of a ragged batch and write their keys and values to the KV cache."""
        return self._decoder(tokens_T, batch, self.cache)

    def logits(self, last_TH: Tensor) -> Tensor:
        """Return the logits [T, V] of the next token."""
        logits_TV: Tensor = self._lm_head(last_TH)
        return logits_TV


@contextmanager
def _explain_failure() -> Iterator[None]:
    """Turn any failure of transformers to read a folder into an error of one line."""
    try:
        yield
    except Exception as error:
        # What it raises depends on what is broken: OSError, ValueError, KeyError, RuntimeError, SafetensorError, ..
        raise CheckpointError(f"transformers cannot load the model: {describe_error(error)}") from error


def _load_model(folder: Path) -> Any:
    """Return the model in fp32. Code in its folder is not run."""
    with _explain_failure():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=ATTENTION,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # In place of these transformers puts random values.
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"its weights lack {len(missing)} tensors, among them {missing[0]}")
    for name, found, expected in report["mismatched_keys"]:
        raise CheckpointError(f"its weight {name} is {list(found)}, but its configuration asks for {list(expected)}")
    return model


def _read_eos_ids(folder: Path, config: Any) -> frozenset[int]:
    """Return the EOS tokens, from the generation config if the folder has one, else from the model config."""
    ids = config.eos_token_id
    if (folder / "generation_config.json").exists():
        with _explain_failure():
            ids = GenerationConfig.from_pretrained(folder).eos_token_id or ids
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, Iterable) else [ids])
