"""The optimizers of a draft, AdamW or Muon for the hidden matrices, and the moving average of its weights.

Muon (Jordan et al., 2024) orthogonalises the momentum of a matrix, which is useless for norms and not meant for
vocabularies: ``lm_head`` and norms stay with AdamW. Muon's updates are scaled to the root mean square of AdamW's, so
one learning rate serves both (Liu et al., arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import structlog
import torch
from torch import Tensor, nn

from schemas.settings import Train
from schemas.speculator.network import EagleDraft

log = structlog.get_logger()

HEAD = "lm_head."


class Optimizers:
    """All optimizers of a draft as one."""

    def __init__(self, draft: nn.Module, train: Train) -> None:
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in draft.named_parameters()}
        norms = [p for p in self._names if p.ndim < 2]
        hidden = [p for p, name in self._names.items() if p.ndim == 2 and not name.startswith(HEAD)]
        head = [p for p, name in self._names.items() if p.ndim == 2 and name.startswith(HEAD)]
        rate, decay = train.learning_rate, train.weight_decay
        by_muon = hidden if train.optimizer == "muon" else []
        matrices = [*([] if by_muon else hidden), *head]
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": matrices, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}],
                lr=rate,
                betas=(train.adamw_beta1, train.adamw_beta2),
                fused=True,
            )
        ]
        if by_muon:
            self._all.append(
                torch.optim.Muon(
                    by_muon,
                    lr=train.muon_learning_rate or rate,
                    weight_decay=decay,
                    ns_steps=train.newton_schulz_steps,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._all]

    def zero_grad(self) -> None:
        """Reset the gradients."""
        for optimizer in self._all:
            optimizer.zero_grad()

    def step(self, factor: float) -> None:
        """Update the weights with this fraction of the learning rates."""
        for optimizer, rates in zip(self._all, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the state of every parameter by name, as ``exp_avg/fc.weight``."""
        for optimizer in self._all:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    yield f"{key}/{self._names[parameter]}", value

    def restore(self, tensors: Mapping[str, Tensor], match_layout: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Load the state that ``state_tensors`` returned; state of another optimizer is ignored and starts at zero.

        Args:
            tensors: All tensors of a checkpoint.
            match_layout: Returns the second tensor in the layout of the first, a parameter.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            key, _, name = path.partition("/")
            found.setdefault(name, {})[key] = value
        for optimizer in self._all:
            keys = _state_keys(optimizer)
            optimizer.state.clear()
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                state = found.get(self._names[parameter], {})
                if state.keys() >= set(keys):
                    optimizer.state[parameter] = {
                        key: match_layout(parameter, state[key]) if state[key].ndim else state[key].to(parameter.device)
                        for key in keys
                    }
                elif any(other.keys() - {"draft", "ema"} for other in found.values()):
                    log.warning("optimizer_state_reset", parameter=self._names[parameter])


class ExponentialMovingAverage:
    """Moving average of a draft's weights; its memory is shorter while there are few steps to average over."""

    def __init__(self, draft: EagleDraft, decay: float) -> None:
        self._decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}

    @torch.no_grad()
    def update(self, draft: EagleDraft, steps: int) -> None:
        """Add the weights after the given number of steps."""
        decay = min(self._decay, (1 + steps) / (10 + steps))
        for name, parameter in draft.named_parameters():
            self.values[name].lerp_(parameter.detach(), 1 - decay)


def _state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of a parameter's state, in the same order on all ranks, which gather them in that order."""
    return ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")
