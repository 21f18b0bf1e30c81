"""The divergence guard: decide from losses and held-out scores whether training has diverged. Pure.

Changing traffic raises the loss too, and lowers the acceptance of any draft. A state is therefore never judged by its
own past scores, but against the champion on the same samples; the running loss only triggers that comparison early.
The champion stays where it is while training slides, so many small falls count like a large one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from pydantic import BaseModel, ConfigDict

MAX_SKIPPED = 3
"""Consecutive skipped steps after which training has diverged. A single one may be a broken sample."""
RECENT, EARLIER = 8, 24
"""Number of recent losses that are compared, and minimum number of losses before them."""
LOSSES_KEPT = RECENT + 64
MAX_DEVIATIONS = 6.0
"""Robust standard deviations that recent losses may lie above earlier ones."""
MIN_DEVIATION = 0.05
"""Lower bound of the standard deviation, relative to the median: losses that hardly vary must not trigger."""
MIN_ACCEPTED_DIFFERENCE, MIN_LOSS_DIFFERENCE = 0.05, 1.0
"""Differences in accepted tokens per step and in loss below which a ratio means nothing."""
_MAD_TO_DEVIATION = 1.4826
"""For normally distributed values."""


class HeldOutScore(BaseModel):
    """The score of a draft on the held-out set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: float | None
    """Loss of the accepted term; None where it is not finite."""
    accepted_per_step: float
    """Simulated, bonus token excluded."""
    draft_vocab: str = ""
    """Digest of the draft vocabulary. Losses over different ones have other positions and are not comparable."""


def is_loss_rising(losses: Sequence[float]) -> bool:
    """Return whether the recent losses lie far above earlier ones.

    Medians, and median deviations from them, are robust against single batches.

    Args:
        losses: Losses of the last steps, oldest first.
    """
    earlier, recent = losses[:-RECENT], losses[-RECENT:]
    if len(earlier) < EARLIER:
        return False
    level = median(earlier)
    deviation = _MAD_TO_DEVIATION * median(abs(loss - level) for loss in earlier)
    return median(recent) > level + MAX_DEVIATIONS * max(deviation, MIN_DEVIATION * abs(level))


def find_divergence(score: HeldOutScore, reference: HeldOutScore, name: str, threshold: float) -> str | None:
    """Return why a draft is much worse than another one; None if it is not.

    Args:
        score: Score of the draft.
        reference: Score of the other draft on the same samples.
        name: Of the other draft, for the reason.
        threshold: Minimum ratio of the accepted tokens per step; its inverse is the maximum ratio of the loss.
    """
    if score.loss is None or not math.isfinite(score.loss):
        return "loss on the held-out set is not finite"
    if score.accepted_per_step < min(
        threshold * reference.accepted_per_step, reference.accepted_per_step - MIN_ACCEPTED_DIFFERENCE
    ):
        return (
            f"{score.accepted_per_step:.3f} accepted tokens per step on the held-out set, "
            f"{reference.accepted_per_step:.3f} of {name}"
        )
    if (
        reference.loss is not None
        and reference.draft_vocab == score.draft_vocab
        and score.loss > max(reference.loss / threshold, reference.loss + MIN_LOSS_DIFFERENCE)
    ):
        return f"loss {score.loss:.3f} on the held-out set, {reference.loss:.3f} of {name}"
    return None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the guard says of a state of training."""

    divergence: str | None
    """Why training has diverged; None if it has not."""
    good: bool
    """Whether training may roll back to the state."""


def judge_state(
    score: HeldOutScore,
    champion: HeldOutScore | None,
    score_last_good: Callable[[], HeldOutScore | None],
    threshold: float,
) -> Judgement:
    """Judge a state of training by its score on the held-out set.

    A state is good unless it is much worse than the champion. Training that began far below the champion, such as from
    day 0, has no good state after its first one until it comes near the champion; it is compared with the first one.

    Args:
        score: Score of the state.
        champion: Score of the champion on the same samples; None while the registry does not answer.
        score_last_good: Scores the last good checkpoint on the same samples; None if there is none.
        threshold: As in ``find_divergence``.
    """
    below = None
    if champion is not None:
        below = find_divergence(score, champion, "the champion", threshold)
        if below is None:
            return Judgement(None, good=True)
    last_good = score_last_good()
    if last_good is None or (champion and not find_divergence(last_good, champion, "the champion", threshold)):
        return Judgement(below, good=False)
    return Judgement(find_divergence(score, last_good, "the last good checkpoint", threshold), good=False)
