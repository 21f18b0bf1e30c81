"""The draft in training: its weights, their average, its optimizers and its learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from schemas.device import device_of
from schemas.settings import Settings, Train
from schemas.speculator.network import DraftShape, EagleDraft
from trainer.data.samples import Batch
from trainer.loop.distributed import Alone, Ranks, like, whole
from trainer.loop.optimizers import Optimizers
from trainer.objective.losses import Loss, Totals, ttt_loss

# Norms of narrow states by float32 weights are what is wanted; that a GPU has no fused kernel for them is no news.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")

_DRAFT, _AVERAGE = "draft/", "ema/"


class Learner:
    """A draft in float32 at a constant rate after a linear warmup, gradients clipped by their norm.

    It is trained where the embeddings are.

    With several ranks every method that says so must be called on all of them, in the same order.
    """

    def __init__(self, draft: EagleDraft, embeddings_VH: Tensor, settings: Train, ranks: Ranks | None = None) -> None:
        self.draft = draft.to(embeddings_VH.device)
        self.steps = 0
        self.gradient_norm = 0.0
        """Of the last step, before clipping."""
        self.unfit = 0
        """Steps in a row that were not taken, because loss or gradient was not finite."""
        self._settings = settings
        self._ranks = ranks or Alone()
        self.shape = draft.shape
        self._device = embeddings_VH.device
        self._module = self._ranks.wrap(_Objective(draft, embeddings_VH, settings), settings.parallel)
        self._optimizers = Optimizers(draft, settings)
        self._average = Average(draft, settings.ema_decay) if settings.ema_decay else None

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._settings.learning_rate * self._warmth

    @property
    def _warmth(self) -> float:
        return min(1.0, (self.steps + 1) / max(self._settings.warmup_steps, 1))

    def step(self, *parts: Batch) -> Loss:
        """Learn from one step's windows, on all ranks, each from its share of them.

        The parts are passed over one after the other; the gradient is that of all of them as one batch, on all ranks
        (but for the objective ``lk``, which weighs by the mean over a part).
        A step with nothing to learn from leaves the weights as they are, and so does one whose loss or gradient is not
        finite.

        Returns:
            The loss of the whole step, detached.
        """
        parts = tuple(part.to(self._device) for part in parts)
        self._optimizers.zero_grad()
        totals = self._totals(parts)
        losses = []
        for number, part in enumerate(parts, start=1):
            with self._ranks.gradients(self._module, last=number == len(parts)):
                loss: Loss = self._module(part, totals)
                if loss.total.requires_grad:
                    # Gradients of ranks are averaged, where those of a whole step's parts are to be added up.
                    (loss.total * self._ranks.size).backward()  # type: ignore[no-untyped-call]
            losses.append(loss)
        loss = _added_up(losses, self._ranks)
        if not loss.positions + loss.nodes:
            return loss
        norm = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self._settings.max_grad_norm)
        self.gradient_norm = float(whole(norm))
        if not torch.isfinite(loss.total + self.gradient_norm):
            self.unfit += 1
            return loss
        self._optimizers.step(self._warmth)
        self.steps += 1
        self.unfit = 0
        if self._average:
            self._average.add(self.draft, self.steps)
        return loss

    def weights(self) -> EagleDraft:
        """What is compared and registered: the average of the weights where one is kept; on all ranks.

        Alone and without an average it is the draft in training itself, else a copy.
        """
        if isinstance(self._ranks, Alone) and self._average is None:
            return self.draft
        state = {name: whole(value) for name, value in self.draft.state_dict().items()}
        if self._average:
            state |= {name: whole(value) for name, value in self._average.values.items()}
        draft = EagleDraft(self.shape).to(self._device)
        draft.load_state_dict(state)
        return draft

    def tensors(self) -> dict[str, Tensor]:
        """Weights, average and optimizer state by name, whole; on all ranks.

        With ``steps`` this is all that the next step depends on.
        """
        tensors = {f"{_DRAFT}{name}": whole(value) for name, value in self.draft.state_dict().items()}
        if self._average:
            tensors |= {f"{_AVERAGE}{name}": whole(value) for name, value in self._average.values.items()}
        return tensors | dict(self._optimizers.tensors(whole))

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take the state that ``tensors`` gave; on all ranks.

        An average or a moment that is not in it begins anew.

        Raises:
            KeyError: a weight is missing.
            RuntimeError: one is of another shape.
        """
        self.adopt({name: tensors[f"{_DRAFT}{name}"] for name in self.draft.state_dict()})
        if self._average:
            for name, value in self._average.values.items():
                if (kept := tensors.get(f"{_AVERAGE}{name}")) is not None:
                    value.copy_(like(value, kept))
        self._optimizers.restore(tensors, like)
        self.steps = steps
        self.unfit = 0

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights and buffers, and begin the average with them; on all ranks.

        Raises:
            RuntimeError: one is missing, or of another shape.
        """
        own = self.draft.state_dict()
        self.draft.load_state_dict({name: like(own.get(name, value), value) for name, value in weights.items()})
        if self._average:
            self._average = Average(self.draft, self._settings.ema_decay)

    def _totals(self, parts: tuple[Batch, ...]) -> Totals:
        """What the means of each part are divided by: known after its pass, so several parts take one more each."""
        if len(parts) == 1:
            return self._ranks.total
        found: list[Tensor] = []

        def noted(own: Tensor) -> Tensor:
            found.append(own.detach())
            return own

        with torch.no_grad():
            for part in parts:
                self._module(part, noted)
        total = self._ranks.total(torch.stack(found).sum(0))
        return lambda _: total


def settled(settings: Settings) -> Settings:
    """The settings with what ``auto`` stands for on this machine in place of it, as versions and replays note them.

    Raises:
        UserError: ``train.device`` asks for a GPU, and torch finds none.
    """
    dtype = products_in(settings.train.dtype, device_of(settings.train.device, "train.device"))
    train = settings.train.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    return settings.model_copy(update={"train": train})


def products_in(asked: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The type of products that the setting ``train.dtype`` asks for on this device."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if asked == "bfloat16" or (asked == "auto" and device.type == "cpu" and native):
        return torch.bfloat16
    return torch.float32


def products(settings: Train, device: torch.device) -> torch.autocast:
    """Passes on this device inside of it multiply in the type that ``train.dtype`` asks for."""
    narrow = products_in(settings.dtype, device) is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=narrow)


def weights_of(tensors: Mapping[str, Tensor], shape: DraftShape) -> EagleDraft:
    """What ``Learner.weights`` gave when ``Learner.tensors`` gave these."""
    draft = EagleDraft(shape)
    state = {name: tensors[f"{_DRAFT}{name}"] for name in draft.state_dict()}
    averages = {name: tensors[path] for name in state if (path := f"{_AVERAGE}{name}") in tensors}
    draft.load_state_dict(state | averages)
    return draft


class Average:
    """Moving average of a draft's weights, as long as there is little to average over with a shorter memory."""

    def __init__(self, draft: EagleDraft, decay: float) -> None:
        self._decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}

    @torch.no_grad()
    def add(self, draft: EagleDraft, steps: int) -> None:
        """Add the weights after so many steps."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        for name, parameter in draft.named_parameters():
            self.values[name].lerp_(parameter.detach(), 1 - decay)


class _Objective(nn.Module):
    """The loss as a module, whose forward pass is what ranks are wrapped around."""

    def __init__(self, draft: EagleDraft, embeddings_VH: Tensor, settings: Train) -> None:
        super().__init__()
        self.draft = draft
        self._embeddings = embeddings_VH
        self._settings = settings

    def forward(self, batch: Batch, totals: Totals) -> Loss:
        """The loss of a part; its gradient reaches every weight also where the part teaches nothing."""
        with products(self._settings, self._embeddings.device):
            loss = ttt_loss(self.draft, self._embeddings, batch, self._settings, totals)
        if torch.is_grad_enabled() and not loss.total.requires_grad:
            nothing = torch.stack([parameter.sum() for parameter in self.draft.parameters()]).sum() * 0
            loss = loss._replace(total=loss.total + nothing)
        return loss


def _added_up(parts: list[Loss], ranks: Ranks) -> Loss:
    """The loss of a step from those of its parts, over all ranks."""
    own = torch.tensor(
        [
            [float(p.total.detach()), p.accepted, p.rejected, p.policy, p.positions, p.nodes, *p.accepted_K]
            for p in parts
        ],
        dtype=torch.float64,
    )
    total, accepted, rejected, policy, positions, nodes, *accepted_K = ranks.total(own.sum(0)).tolist()
    return Loss(
        total=parts[0].total.new_tensor(total) if len(parts) * ranks.size > 1 else parts[0].total.detach(),
        accepted=accepted,
        accepted_K=tuple(accepted_K),
        rejected=rejected,
        policy=policy,
        positions=int(positions),
        nodes=int(nodes),
    )
