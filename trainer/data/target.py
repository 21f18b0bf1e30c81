"""The frozen target, as far as the trainer needs it: identity, token embeddings, hidden states, and generation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from schemas.settings import Settings
from schemas.speculator.day_0_draft import read_embeddings, read_line
from schemas.speculator.network import EagleDraft

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """The frozen model that drafts are trained for. V target vocabulary, H hidden size."""

    fingerprint: str
    line: str
    embeddings_VH: Tensor
    """In the dtype of the target's checkpoint."""
    day_0: EagleDraft
    """The draft that nodes start with."""

    def to(self, device: torch.device) -> Target:
        """Return the target with its embeddings on a device: drafts are trained and scored on that device."""
        return replace(self, embeddings_VH=self.embeddings_VH.to(device))

    def new_draft(self) -> EagleDraft:
        """Return a copy of the draft of day 0, to train."""
        return copy.deepcopy(self.day_0)


def read_target(settings: Settings) -> Target:
    """Read the target that the settings name, and the speculator line that follows from both.

    Raises:
        CheckpointError: the folder holds no model, or one that the draft network does not fit.
    """
    line = read_line(settings.target, settings.speculator)
    return Target(line.target, line.name, read_embeddings(Path(settings.target.path)), line.day_0_draft)


class FrozenTarget:
    """The target up to the highest captured layer, for samples without features; loaded at the first use.

    Neither the layers above nor the output matrix are read. It computes in float32 as nodes do, so its states differ
    from theirs only by the order of additions.
    """

    def __init__(self, folder: Path, capture_layers: tuple[int, ...], device: torch.device) -> None:
        self._folder = folder
        self._layers = capture_layers
        self._device = device
        self._body: Any = None
        self._captured = _CapturedStates(capture_layers)

    @torch.no_grad()
    def compute_states(self, tokens_n: Tensor) -> Tensor:
        """Return [n, F] bf16: the concatenated outputs of the captured layers after each token, lowest layer first.

        They are computed on the device, and returned on the CPU.

        Args:
            tokens_n: Tokens of one request, from its first token on.
        """
        if self._body is None:
            self._body = self._load()
        self._body(input_ids=tokens_n[None].to(self._device), use_cache=False)
        return self._captured.read_BTF()[0]

    def _load(self) -> Any:
        # Most trainers receive features with the traces and never need transformers.
        from transformers import AutoConfig, AutoModel

        config: Any = AutoConfig.from_pretrained(self._folder, local_files_only=True)
        config.num_hidden_layers = max(self._layers) + 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        # Of a file, only the tensors that the model has are read.
        model: Any = AutoModel.from_pretrained(self._folder, config=config, dtype=torch.float32, local_files_only=True)
        body = model.requires_grad_(requires_grad=False).eval().to(self._device)
        self._captured.attach(body.layers)
        log.info("target_loaded", folder=str(self._folder), layers=len(body.layers), reason="samples without features")
        return body


@dataclass(frozen=True, slots=True, eq=False)
class TargetOutput:
    """The result of one forward. B sequences, T tokens of the longest, F feature width, V target vocabulary."""

    states_BTF: Tensor
    """bf16 on the CPU: the captured states after each token. Tokens of shorter sequences are at the end."""
    logits_BV: Tensor
    """float32 on the device: after the last token of each sequence."""


class GeneratingTarget:
    """The whole target with a key-value cache, which continues a batch of sequences; in float32 as on nodes."""

    def __init__(self, folder: Path, capture_layers: tuple[int, ...], device: torch.device) -> None:
        """Load the target.

        Raises:
            OSError: the folder holds no model that transformers can read.
            ValueError: the same.
        """
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self._model = model.requires_grad_(requires_grad=False).eval().to(device)
        self._captured = _CapturedStates(capture_layers)
        self._captured.attach(model.base_model.layers)
        self._device = device
        end: int | list[int] | None = model.generation_config.eos_token_id or model.config.eos_token_id
        self.eos_ids = frozenset([end] if isinstance(end, int) else end or [])
        """Tokens that end an answer."""
        self.max_length: int = model.config.max_position_embeddings
        """Most tokens of a sequence."""
        self._cache: Any = None
        self._mask_BL: Tensor | None = None
        self._lengths_B = torch.empty(0, dtype=torch.int64)

    def start(self, prompts: Sequence[Sequence[int]]) -> TargetOutput:
        """Read the prompts of a new batch."""
        from transformers import DynamicCache

        longest = max(map(len, prompts))
        # Padded at the start, so that all sequences continue at the same place.
        tokens_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        at_BT = torch.arange(longest) - (longest - lengths_B)[:, None]
        # Without a mask, attention is computed without copies of the keys and values for each query head.
        self._mask_BL = None if bool((lengths_B == longest).all()) else (at_BT >= 0).long().to(self._device)
        self._cache = DynamicCache(config=self._model.config)
        self._lengths_B = lengths_B
        return self._forward(tokens_BT, at_BT.clamp_min(0))

    def feed(self, tokens_B: Sequence[int]) -> TargetOutput:
        """Append one token to each sequence."""
        if self._mask_BL is not None:
            self._mask_BL = torch.cat([self._mask_BL, self._mask_BL.new_ones(len(self._mask_BL), 1)], dim=1)
        positions_BT = self._lengths_B[:, None]
        self._lengths_B = self._lengths_B + 1
        return self._forward(torch.tensor(tokens_B)[:, None], positions_BT)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other sequences."""
        kept = torch.tensor(rows)
        self._cache.batch_select_indices(kept.to(self._device))
        self._lengths_B = self._lengths_B[kept]
        self._mask_BL = None if self._mask_BL is None else self._mask_BL[kept.to(self._device)]

    @torch.no_grad()
    def _forward(self, tokens_BT: Tensor, positions_BT: Tensor) -> TargetOutput:
        result = self._model(
            input_ids=tokens_BT.to(self._device),
            position_ids=positions_BT.to(self._device),
            attention_mask=self._mask_BL,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return TargetOutput(self._captured.read_BTF(), result.logits[:, -1].float())


class _CapturedStates:
    """The outputs of decoder layers at the last forward. B sequences, T tokens, F feature width."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._layers = layers
        self._outputs: dict[int, Tensor] = {}

    def attach(self, decoder_layers: Any) -> None:
        """Keep the outputs of the captured layers from now on."""
        for layer in self._layers:
            decoder_layers[layer].register_forward_hook(self._capture(layer))

    def read_BTF(self) -> Tensor:
        """Return bf16 on the CPU: the concatenated outputs, lowest layer first."""
        return torch.cat([self._outputs[layer] for layer in self._layers], dim=-1).to("cpu", torch.bfloat16)

    def _capture(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook
