"""A training step of another trainer, as ``aurora bench trainer`` runs it, by the Python of ``make trainer-peers``.

    python -P peer_training_step.py FOLDER TTT_STEPS < STEPS

reads lines of ``PEER WEIGHTS BATCH WAY``, and writes what each step computes to ``FOLDER/PEER WEIGHTS BATCH WAY``
(safetensors): ``logits K`` and ``loss K`` of TTT step K, and the clipped gradient of every weight under its name.
WEIGHTS is a folder of ``synthetic_data.write_weights`` in FOLDER, BATCH a file there with sequences.

Shapes: S sequences of n tokens, D draft vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ops.bench.trainer.peer_worker import CONFIG, DECAY, WEIGHTS, SpecForge, Speculators

PEERS = {"speculators": Speculators, "specforge": SpecForge}


def read_losses(outputs: list[Any], ttt_steps: int) -> list[Tensor]:
    """The loss of each TTT step, before its decay: speculators adds up in its model, and has a call per pack."""
    if len(outputs[0]) > 3:
        return [loss.detach() for loss in outputs[0][0]]
    return [
        torch.stack([metrics[f"loss_{k}_sum"] for _, _, metrics in outputs]).mean() / DECAY**k for k in range(ttt_steps)
    ]


def compute_step(peer: str, folder: Path, batch: str, way: str, ttt_steps: int) -> dict[str, Tensor]:
    """Train for one step; logits are [S (n - 1), D]."""
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    trainer = PEERS[peer](weights, json.loads((folder / CONFIG).read_text()))
    outputs: list[Any] = []
    calls: list[Tensor] = []
    modules = dict(trainer.model.named_modules())
    head = modules.get("lm_head") or modules["draft_model.lm_head"]
    head.register_forward_hook(lambda _, __, logits: calls.append(logits.detach().flatten(0, 1)))
    trainer.model.register_forward_hook(lambda _, __, output: outputs.append(output))
    trainer.step(torch.load(folder / batch, weights_only=True), ttt_steps, way)
    found = {f"logits {k}": torch.cat(calls[k::ttt_steps]) for k in range(ttt_steps)}
    found |= {f"loss {k}": loss for k, loss in enumerate(read_losses(outputs, ttt_steps))}
    gradients = {
        name.removeprefix("draft_model.").replace("layers.0.", "midlayer."): parameter.grad
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    return found | gradients


def main(folder: Path, ttt_steps: int) -> None:
    """Compute the steps and write them down."""
    for line in sys.stdin:
        name = line.strip()
        peer, weights, batch, way = name.split(maxsplit=3)
        found = compute_step(peer, folder / weights, batch, way, ttt_steps)
        save_file({key: value.contiguous().clone() for key, value in found.items()}, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
