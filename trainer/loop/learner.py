"""The training step of a draft: forward, backward, clipping, optimizers and moving average."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from schemas.device import select_device
from schemas.settings import Settings, Train
from schemas.speculator.network import DraftShape, EagleDraft
from trainer.data.batch import Batch
from trainer.loop.checkpoints import load_tensors, save_tensors
from trainer.loop.distributed import Ranks, TorchrunRanks, gather_tensor, match_layout
from trainer.loop.optimizers import ExponentialMovingAverage, Optimizers
from trainer.objective.losses import Loss, SumCounts, ttt_loss

# Norms multiply bf16 states by float32 weights on purpose; the missing fused GPU kernel for that costs little.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")

_DRAFT, _EMA, _HEAD = "draft/", "ema/", "lm_head.weight"


class Learner:
    """A draft in float32, its optimizers and its moving average, on the device of the embeddings.

    The learning rate is constant after a linear warmup. With several ranks, call the methods marked "on all ranks" on
    all of them in the same order.
    """

    def __init__(self, draft: EagleDraft, embeddings_VH: Tensor, settings: Train, ranks: Ranks | None = None) -> None:
        self.draft = draft.to(embeddings_VH.device)
        self.steps = 0
        self.gradient_norm = 0.0
        """Of the last step, before clipping."""
        self.skipped = 0
        """Consecutive steps that were skipped because the loss or the gradient was not finite."""
        self._settings = settings
        self.ranks = ranks or Ranks()
        """The processes that train together."""
        self.shape = draft.shape
        self._device = embeddings_VH.device
        self._saving: Future[None] | None = None
        self._module = self.ranks.wrap(_LossModule(draft, embeddings_VH, settings), settings.parallel)
        self._optimizers = Optimizers(draft, settings)
        self._rate_factor = 1.0
        self._ema = ExponentialMovingAverage(draft, settings.ema_decay) if settings.ema_decay else None

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return self._settings.learning_rate * self._schedule

    @property
    def _schedule(self) -> float:
        return self._rate_factor * min(1.0, (self.steps + 1) / max(self._settings.warmup_steps, 1))

    def use_warm_start_rate(self) -> None:
        """Train with ``train.warm_start_learning_rate`` from now on; on all ranks."""
        rate = self._settings.learning_rate
        self._rate_factor = (self._settings.warm_start_learning_rate or rate) / rate

    def step(self, *batches: Batch) -> Loss:
        """Train on the batches of one step, on all ranks, each with its own.

        Gradients are accumulated over the batches and ranks: they equal those of one large batch (except for the
        objective ``lk``, which weights by the mean over a batch). A step without a teacher, with a gradient of zero, or
        with a loss or gradient that is not finite, changes no weight and does not count in ``steps``.

        Returns:
            The loss of the whole step, detached.
        """
        batches = tuple(batch.to(self._device) for batch in batches)
        self._optimizers.zero_grad()
        sum_counts = self._count(batches)
        losses = []
        for number, batch in enumerate(batches, start=1):
            with self.ranks.synchronize(self._module, last=number == len(batches)):
                loss: Loss = self._module(batch, sum_counts)
                if loss.total.requires_grad:
                    # Ranks average their gradients, but the gradients of a step's batches have to be summed.
                    (loss.total * self.ranks.size).backward()  # type: ignore[no-untyped-call]
            losses.append(loss)
        loss = _sum_losses(losses, self.ranks)
        if not loss.positions + loss.nodes:
            return loss
        norm = torch.nn.utils.clip_grad_norm_(self.draft.parameters(), self._settings.max_grad_norm)
        self.gradient_norm = float(gather_tensor(norm))
        if not torch.isfinite(loss.total + self.gradient_norm):
            self.skipped += 1
            return loss
        if not self.gradient_norm:
            return loss  # weight decay and momentum would move the weights all the same
        self._optimizers.step(self._schedule)
        self.steps += 1
        self.skipped = 0
        if self._ema:
            self._ema.update(self.draft, self.steps)
        return loss

    def export_draft(self) -> EagleDraft:
        """Return the draft to evaluate and register: with averaged weights if an average is kept; on all ranks.

        With one rank and without an average it is the draft in training itself, otherwise a copy.
        """
        if not isinstance(self.ranks, TorchrunRanks) and self._ema is None:
            return self.draft
        state = {name: gather_tensor(value) for name, value in self.draft.state_dict().items()}
        if self._ema:
            state |= {name: gather_tensor(value) for name, value in self._ema.values.items()}
        draft = EagleDraft(self.shape).to(self._device)
        draft.load_state_dict(state)
        return draft

    def state_tensors(self) -> dict[str, Tensor]:
        """Return weights, average and optimizer state by name, sharded as they are.

        Together with ``steps`` they determine the next step.
        """
        tensors = {f"{_DRAFT}{name}": value for name, value in self.draft.state_dict().items()}
        if self._ema:
            tensors |= {f"{_EMA}{name}": value for name, value in self._ema.values.items()}
        return tensors | dict(self._optimizers.state_tensors())

    def save(self, folder: Path) -> Future[None]:
        """Copy the state and write it to a folder from another thread; on all ranks."""
        if self._saving is not None:
            wait([self._saving])
        self._saving = save_tensors(self.state_tensors(), folder, self.ranks.checkpoint_group)
        return self._saving

    def load(self, folder: Path, steps: int) -> None:
        """Load the state that ``save`` wrote, on any number of ranks; on all ranks.

        Raises:
            OSError: a file cannot be read.
            KeyError: a weight is missing.
            RuntimeError: a weight has another shape.
        """
        own = self.draft.state_dict()
        self.restore(load_tensors(folder, layout=lambda path: own.get(path.partition("/")[2])), steps)

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Load the state that ``state_tensors`` returned, whole or sharded as it is here; on all ranks.

        An average or a moment that is missing starts anew.

        Raises:
            KeyError: a weight is missing.
            RuntimeError: a weight has another shape.
        """
        self.load_weights({name: tensors[f"{_DRAFT}{name}"] for name in self.draft.state_dict()})
        if self._ema:
            for name, value in self._ema.values.items():
                if (average := tensors.get(f"{_EMA}{name}")) is not None:
                    value.copy_(match_layout(value, average))
        self._optimizers.restore(tensors, match_layout)
        self.steps = steps
        self.skipped = 0

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights and buffers, and restart the average from them; on all ranks.

        Raises:
            RuntimeError: a weight is missing or has another shape.
        """
        own = self.draft.state_dict()
        self.draft.load_state_dict({name: match_layout(own.get(name, value), value) for name, value in weights.items()})
        if self._ema:
            self._ema = ExponentialMovingAverage(self.draft, self._settings.ema_decay)

    def change_vocabulary(self, fresh: Mapping[str, Tensor]) -> None:
        """Draft from other tokens, as many; on all ranks.

        Tokens of both vocabularies keep their row of the head, of its average and of its moments. The other tokens of
        the new one get the fresh row, and moments of zero.

        Args:
            fresh: ``lm_head.weight``, ``d2t`` and ``t2d`` of an untrained draft with the new vocabulary.
        """
        old_V, new_V = self.draft.t2d.cpu(), fresh["t2d"]
        both_V = old_V & new_V
        old_rows, new_rows = ((t2d.cumsum(0) - 1)[both_V] for t2d in (old_V, new_V))
        tensors = {path: gather_tensor(value) for path, value in self.state_tensors().items()}
        for path, value in tensors.items():
            if not path.endswith(f"/{_HEAD}") or value.ndim != 2:
                continue
            is_weight = path.startswith((_DRAFT, _EMA))
            changed_DH = fresh[_HEAD].to(value, copy=True) if is_weight else torch.zeros_like(value)
            changed_DH[new_rows] = value[old_rows]
            tensors[path] = changed_DH
        self.restore(tensors | {f"{_DRAFT}{name}": fresh[name] for name in ("d2t", "t2d")}, self.steps)

    def _count(self, batches: tuple[Batch, ...]) -> SumCounts:
        """Return the denominators of the step's means; several batches need one more forward each to count them."""
        if len(batches) == 1:
            return self.ranks.sum
        found: list[Tensor] = []

        def collect(counts: Tensor) -> Tensor:
            found.append(counts.detach())
            return counts

        with torch.no_grad():
            for batch in batches:
                self._module(batch, collect)
        total = self.ranks.sum(torch.stack(found).sum(0))
        return lambda _: total


class _LossModule(nn.Module):
    """The loss as a module that DDP or FSDP2 can wrap."""

    def __init__(self, draft: EagleDraft, embeddings_VH: Tensor, settings: Train) -> None:
        super().__init__()
        self.draft = draft
        self._embeddings_VH = embeddings_VH
        self._settings = settings

    def forward(self, batch: Batch, sum_counts: SumCounts) -> Loss:
        """Return the loss of a batch; its gradient reaches every weight even if the batch has no teacher."""
        with autocast(self._settings, self._embeddings_VH.device):
            loss = ttt_loss(self.draft, self._embeddings_VH, batch, self._settings, sum_counts)
        if torch.is_grad_enabled() and not loss.total.requires_grad:
            zero = torch.stack([parameter.sum() for parameter in self.draft.parameters()]).sum() * 0
            loss = loss._replace(total=loss.total + zero)
        return loss


def load_draft(folder: Path, shape: DraftShape) -> EagleDraft:
    """Return the draft that ``Learner.export_draft`` returned when ``Learner.save`` wrote to a folder.

    Raises:
        OSError: a file cannot be read.
    """
    draft, tensors = EagleDraft(shape), load_tensors(folder, (_DRAFT, _EMA))
    state = {name: tensors[f"{_DRAFT}{name}"] for name in draft.state_dict()}
    averages = {name: tensors[path] for name in state if (path := f"{_EMA}{name}") in tensors}
    draft.load_state_dict(state | averages)
    return draft


def resolve_dtype(settings: Settings) -> Settings:
    """Return the settings with this machine's dtype in place of ``auto``, as versions and experiments record them.

    Raises:
        UserError: ``train.device`` names a GPU, and torch finds none.
    """
    dtype = select_dtype(settings.train.dtype, select_device(settings.train.device, "train.device"))
    train = settings.train.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    return settings.model_copy(update={"train": train})


def select_dtype(requested: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products that ``train.dtype`` means on a device."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if requested == "bfloat16" or (requested == "auto" and device.type == "cpu" and native):
        return torch.bfloat16
    return torch.float32


def autocast(settings: Train, device: torch.device) -> torch.autocast:
    """Return a context in which matrix products have the dtype that ``train.dtype`` means on a device."""
    narrow = select_dtype(settings.dtype, device) is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=narrow)


def _sum_losses(losses: list[Loss], ranks: Ranks) -> Loss:
    """Return the loss of a step from those of its batches, over all ranks."""
    own = torch.tensor(
        [
            [float(x.total.detach()), x.accepted, x.rejected, x.policy, x.positions, x.nodes, *x.accepted_K]
            for x in losses
        ],
        dtype=torch.float64,
    )
    total, accepted, rejected, policy, positions, nodes, *accepted_K = ranks.sum(own.sum(0)).tolist()
    return Loss(
        total=losses[0].total.new_tensor(total) if len(losses) * ranks.size > 1 else losses[0].total.detach(),
        accepted=accepted,
        accepted_K=tuple(accepted_K),
        rejected=rejected,
        policy=policy,
        positions=int(positions),
        nodes=int(nodes),
    )
