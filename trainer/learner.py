"""The draft in training: its weights, its optimizer and its learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from schemas.settings import Train
from schemas.speculator.network import EagleDraft
from trainer.losses import Loss, ttt_loss
from trainer.windows import Batch

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Learner:
    """AdamW over a draft in float32, constant rate after a linear warmup, gradients clipped by their norm."""

    def __init__(self, draft: EagleDraft, embeddings_VH: Tensor, settings: Train) -> None:
        self.draft = draft
        self.steps = 0
        self._embeddings = embeddings_VH
        self._settings = settings
        self._optimizer = torch.optim.AdamW(draft.parameters(), lr=settings.learning_rate, fused=True)

    def step(self, batch: Batch) -> Loss:
        """Learn from one batch; a batch with nothing to learn from leaves the weights as they are."""
        train = self._settings
        loss = ttt_loss(self.draft, self._embeddings, batch, train.ttt_steps, train.ttt_decay, train.rejected_weight)
        if not loss.positions + loss.nodes:
            return loss
        self._optimizer.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), train.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = train.learning_rate * min(1.0, (self.steps + 1) / max(train.warmup_steps, 1))
        self._optimizer.step()
        self.steps += 1
        return loss

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name; with ``steps`` all that the next step depends on."""
        tensors = {f"draft/{name}": value for name, value in self.draft.state_dict().items()}
        for name, parameter in self.draft.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take the state that ``tensors`` gave.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: one is of another shape.
        """
        prefix = "draft/"
        self.draft.load_state_dict(
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        )
        if steps:
            for name, parameter in self.draft.named_parameters():
                self._optimizer.state[parameter] = {key: tensors[f"{key}/{name}"].clone() for key in _MOMENTS}
        self.steps = steps
