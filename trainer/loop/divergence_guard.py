"""When training has gone wrong: decisions over losses and over figures of the held-out set, without I/O.

Traffic that changes raises the loss too, and lowers the accepted tokens per step of any draft. So a state is never
judged by its
own past figures, but beside the last good state on the same windows; the running statistics only say when to look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from pydantic import BaseModel, ConfigDict

UNFIT = 3
"""Steps in a row without a finite loss and gradient. One may be a broken window; it is passed over."""
RECENT, EARLIER = 8, 24
"""Losses that are compared with those before them, and how many of those it takes."""
KEPT = RECENT + 64
DEVIATIONS = 6.0
"""Robust standard deviations by which recent losses lie above earlier ones when it is time to look."""
LEAST_DEVIATION = 0.05
"""As a share of the median: losses that hardly vary must not make every change look large."""
LEAST_LENGTH, LEAST_LOSS = 0.05, 1.0
"""Differences in accepted tokens per step and in loss below which a share means nothing."""
_MAD_TO_DEVIATION = 1.4826
"""For normally distributed values."""


class Health(BaseModel):
    """Figures of a draft on the held-out set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: float | None
    """Of the accepted term; None where it is not finite."""
    accepted_per_step: float
    """Simulated, bonus excluded."""


def rising(losses: Sequence[float]) -> bool:
    """Whether the newest losses lie so far above those before them that it is worth a look.

    Medians, and the median deviation from them, are not moved by single batches.

    Args:
        losses: Of the last steps, oldest first.
    """
    earlier, recent = losses[:-RECENT], losses[-RECENT:]
    if len(earlier) < EARLIER:
        return False
    level = median(earlier)
    deviation = _MAD_TO_DEVIATION * median(abs(loss - level) for loss in earlier)
    return median(recent) > level + DEVIATIONS * max(deviation, LEAST_DEVIATION * abs(level))


def fallen(now: Health, good: Health, share: float) -> str | None:
    """Why a draft is much worse than another one; None where it is not.

    Args:
        now: The draft in training.
        good: The last good state.
        share: Of the accepted tokens per step that must be left; the loss may be higher by its inverse.
    """
    if now.loss is None or not math.isfinite(now.loss):
        return "loss on the held-out set is not finite"
    lengths = (
        f"accepted tokens per step {now.accepted_per_step:.3f}, {good.accepted_per_step:.3f} in the last good state"
    )
    if now.accepted_per_step < min(share * good.accepted_per_step, good.accepted_per_step - LEAST_LENGTH):
        return lengths
    if good.loss is not None and now.loss > max(good.loss / share, good.loss + LEAST_LOSS):
        return f"loss {now.loss:.3f} on the held-out set, {good.loss:.3f} in the last good state"
    return None
