"""The frozen target, as far as the trainer needs it: identity, token embeddings, and hidden states to recompute."""

from __future__ import annotations

import copy
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
        self._captured: dict[int, Tensor] = {}

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
        return torch.cat([self._captured[layer][0] for layer in self._layers], dim=-1).to("cpu", torch.bfloat16)

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
        for layer in self._layers:
            body.layers[layer].register_forward_hook(self._capture(layer))
        log.info("target_loaded", folder=str(self._folder), layers=len(body.layers), reason="samples without features")
        return body

    def _capture(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook
