"""Decide which version may become candidate and which champion: pure functions over figures of the held-out set.

Both versions are scored on the same samples. A version must beat the champion with the lower bound of its gain: where
nothing was gained, the mean over a few prompts exceeds zero every second time. For the same reason a version loses on a
label only where the upper bound of its gain there is negative. Tags hold accepted tokens per step (bonus excluded);
texts show acceptance length (bonus included).

Shapes: P prompts, B resamples, 2 = accepted tokens and verify steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.events import QUARANTINED_TAG
from schemas.settings import DAY_0, Promoter

F64 = npt.NDArray[np.float64]

HELD_OUT_TAG = "held_out"
"""Tag of a version with its ``HeldOutComparison``, as JSON."""
RESAMPLES, SEED = 2000, 0
MIN_SQUARES = 1e-9
"""Sum of squared residuals, in accepted tokens, below which prompts have the same gain up to rounding."""


class GainInterval(NamedTuple):
    """Bounds of the gain of a version over another one on the same prompts, in accepted tokens per step."""

    low: float
    high: float
    prompts: int


def estimate_gain(own_P2: F64, other_P2: F64, error: float) -> GainInterval | None:
    """Return the bounds of the gain over all prompts, by a studentized bootstrap over them.

    Tokens of one prompt depend on each other, whether they are of one request, of its choices or of the turns of a
    conversation; prompts do not. So whole prompts are resampled, for both versions together (Efron and Tibshirani, "An
    Introduction to the Bootstrap", 1993, section 12.5). Percentiles of resampled gains would be too narrow for few
    prompts. The gain is a difference of two ratios of sums, since each version runs its own verify steps, and its
    standard error that of the linearized ratios (Cochran, "Sampling Techniques", 1977, sections 2.11 and 6.17). A
    resample whose prompts all have the same gain has no standard error, and counts as infinitely far off on both sides.
    Where no prompt differs from another, both bounds are the gain.

    Args:
        own_P2: Accepted tokens and verify steps of the version, by prompt; steps are above 0.
        other_P2: The same of the other one.
        error: Probability with which the true gain is below the lower bound, and with which it is above the upper one.

    Returns:
        None where too few prompts differ for bounds.
    """
    prompts = len(own_P2)
    if prompts < 2:
        return None
    drawn_BP = np.random.default_rng(SEED).integers(prompts, size=(RESAMPLES, prompts))
    (gain,), (deviation,) = _compute_gains(own_P2[None], other_P2[None])
    if not deviation:
        return GainInterval(float(gain), float(gain), prompts)
    gain_B, deviation_B = _compute_gains(own_P2[drawn_BP], other_P2[drawn_BP])
    has_deviation_B = deviation_B > 0
    off_B = np.divide(gain_B - gain, deviation_B, out=np.full(RESAMPLES, np.inf), where=has_deviation_B)
    above = np.quantile(off_B, 1 - error, method="higher")
    below = np.quantile(np.where(has_deviation_B, off_B, -np.inf), error, method="lower")
    if not np.isfinite([above, below]).all():
        return None
    return GainInterval(float(gain - above * deviation), float(gain - below * deviation), prompts)


def _compute_gains(own_BP2: F64, other_BP2: F64) -> tuple[F64, F64]:
    """Return [B] the gains over all prompts and their standard errors; 0 where all prompts have the same gain."""
    prompts = own_BP2.shape[1]
    (own_B, change_BP, steps_B), (other_B, other_change_BP, other_steps_B) = map(_linearize, (own_BP2, other_BP2))
    squares_B = ((change_BP - other_change_BP) ** 2).sum(axis=1)
    squares_B[squares_B * steps_B * other_steps_B < MIN_SQUARES] = 0
    return own_B - other_B, np.sqrt(squares_B * prompts / (prompts - 1))


def _linearize(counts_BP2: F64) -> tuple[F64, F64, F64]:
    """Return [B] accepted tokens per step, [B, P] by how much each prompt changes them, and [B] all verify steps."""
    tokens_BP, steps_BP = counts_BP2[..., 0], counts_BP2[..., 1]
    steps_B = steps_BP.sum(axis=1)
    ratio_B = tokens_BP.sum(axis=1) / steps_B
    return ratio_B, (tokens_BP - ratio_B[:, None] * steps_BP) / steps_B[:, None], steps_B


class LabelComparison(BaseModel):
    """Both versions on the held-out samples of one label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str | None
    """Empty for traffic without a label; None for all labels with too few samples of their own, taken together."""
    accepted_per_step: float
    champion_accepted_per_step: float
    gain_low: float | None = None
    """Lower bound of the gain, by ``estimate_gain``; None where too few prompts differ for one."""
    gain_high: float | None = None
    samples: int

    def __str__(self) -> str:
        name = "the other labels" if self.label is None else f"label {self.label or 'none'}"
        lengths = f"{1 + self.accepted_per_step:.3f} against {1 + self.champion_accepted_per_step:.3f}"
        return f"{name} {lengths} on {self.samples} samples"


class HeldOutComparison(BaseModel):
    """A version against the champion at its registration, on the same held-out samples: its tag ``HELD_OUT_TAG``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accepted_per_step: float
    champion: str
    """Champion version, or a version of day 0."""
    champion_accepted_per_step: float
    gain_low: float | None = None
    """Lower bound of the gain, by ``estimate_gain``; None in versions of trainers that compared means."""
    gain_high: float | None = None
    samples: int
    prompts: int = 0
    """Held-out prompts that the samples belong to."""
    labels: tuple[LabelComparison, ...] = ()

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> HeldOutComparison:
        """Parse the comparison from a version's tags.

        Raises:
            ValidationError: the tag is missing or malformed.
        """
        return cls.model_validate_json(tags.get(HELD_OUT_TAG, ""))

    def is_against(self, champion: str | None) -> bool:
        """Return whether the version was compared with this champion; None is day 0."""
        return self.champion.startswith(DAY_0) if champion is None else self.champion == champion

    @property
    def figures(self) -> dict[str, float]:
        """The numbers, for audit rows and events."""
        by_label = {
            f"{name}/{label.label}": value
            for label in self.labels
            if label.label is not None
            for name, value in label.model_dump(exclude={"label", "samples"}, exclude_none=True).items()
        }
        return self.model_dump(exclude={"champion", "labels"}, exclude_none=True) | by_label

    @property
    def interval(self) -> str:
        """The bounds of the gain and the number of prompts, for people."""
        if self.gain_low is None or self.gain_high is None:
            return "without an interval"
        return f"gain {self.gain_low:+.3f} to {self.gain_high:+.3f} on {self.prompts} prompts"

    def find_regression(self, margin: float, min_samples: int) -> LabelComparison | None:
        """Return the label with the largest loss against the champion, if the loss exceeds the margin and is no chance.

        It is none where the upper bound of the gain is negative: on one of several labels with few prompts each, a mean
        falls below the margin more often than not.
        """
        worse = [label for label in self.labels if label.samples >= min_samples and (label.gain_high or 0) < 0]
        worst = min(worse, key=lambda one: one.accepted_per_step - one.champion_accepted_per_step, default=None)
        if worst is None or worst.accepted_per_step >= worst.champion_accepted_per_step - margin:
            return None
        return worst


@dataclass(frozen=True, slots=True)
class Verdict:
    """Decision of the gate on a candidate."""

    promote: bool
    why: str


def judge_candidate(
    candidate: str | None, champion: str | None, tags: Mapping[str, str], settings: Promoter
) -> Verdict:
    """Return whether the candidate beats the champion on the held-out set and regresses on none of its labels.

    Args:
        candidate: Version with the alias ``candidate``.
        champion: Version with the alias ``champion``; None while nodes draft with day 0.
        tags: Of the candidate.
        settings: Margins, and the samples that a comparison needs.
    """
    if candidate is None or candidate == champion:
        return Verdict(promote=False, why="no candidate" if candidate is None else f"version {candidate} is champion")
    if why := tags.get(QUARANTINED_TAG):
        return Verdict(promote=False, why=f"version {candidate} is in quarantine: {why}")
    try:
        held_out = HeldOutComparison.from_tags(tags)
    except ValidationError as error:
        return Verdict(promote=False, why=f"version {candidate}: tag {HELD_OUT_TAG}: {error.errors()[0]['msg']}")
    return _judge_figures(candidate, champion, held_out, settings)


def _judge_figures(candidate: str, champion: str | None, held_out: HeldOutComparison, settings: Promoter) -> Verdict:
    figures = (
        f"version {candidate}: acceptance length {1 + held_out.accepted_per_step:.3f}, "
        f"{1 + held_out.champion_accepted_per_step:.3f} of {held_out.champion}, on {held_out.samples} samples; "
        f"{held_out.interval}"
    )
    if not held_out.is_against(champion):
        return Verdict(promote=False, why=f"{figures}: champion is {champion or DAY_0}, waiting for the next candidate")
    if held_out.samples < settings.gate_min_samples:
        return Verdict(promote=False, why=f"{figures}: promoter.gate_min_samples requires {settings.gate_min_samples}")
    if regression := held_out.find_regression(settings.gate_label_margin, settings.gate_label_min_samples):
        margin = f"promoter.gate_label_margin {settings.gate_label_margin:g}"
        return Verdict(promote=False, why=f"{figures}: worse by more than {margin} on {regression}")
    better = held_out.gain_low is not None and held_out.gain_low > settings.gate_margin
    not_ = "" if better else "not "
    return Verdict(better, f"{figures}: {not_}better by more than promoter.gate_margin {settings.gate_margin:g}")
