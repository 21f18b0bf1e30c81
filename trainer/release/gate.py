"""Decide which version may become candidate and which champion: pure functions over figures of the held-out set.

Both versions are scored on the same samples. Tags hold accepted tokens per step (bonus excluded); texts show acceptance
length (bonus included).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.events import QUARANTINED_TAG
from schemas.settings import DAY_0, Promoter

HELD_OUT_TAG = "held_out"
"""Tag of a version with its ``HeldOutComparison``, as JSON."""


class LabelComparison(BaseModel):
    """Both versions on the held-out samples of one label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str | None
    """Empty for traffic without a label; None for all labels with too few samples of their own, taken together."""
    accepted_per_step: float
    champion_accepted_per_step: float
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
    samples: int
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
            for name, value in label.model_dump(exclude={"label", "samples"}).items()
        }
        return self.model_dump(exclude={"champion", "labels"}) | by_label

    def find_regression(self, margin: float, min_samples: int) -> LabelComparison | None:
        """Return the label with the largest loss against the champion, if the loss exceeds the margin."""
        large = [label for label in self.labels if label.samples >= min_samples]
        worst = min(large, key=lambda one: one.accepted_per_step - one.champion_accepted_per_step, default=None)
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
        f"{1 + held_out.champion_accepted_per_step:.3f} of {held_out.champion}, on {held_out.samples} samples"
    )
    if not held_out.is_against(champion):
        return Verdict(promote=False, why=f"{figures}: champion is {champion or DAY_0}, waiting for the next candidate")
    if held_out.samples < settings.gate_min_samples:
        return Verdict(promote=False, why=f"{figures}: promoter.gate_min_samples requires {settings.gate_min_samples}")
    if regression := held_out.find_regression(settings.gate_label_margin, settings.gate_label_min_samples):
        margin = f"promoter.gate_label_margin {settings.gate_label_margin:g}"
        return Verdict(promote=False, why=f"{figures}: worse by more than {margin} on {regression}")
    better = held_out.accepted_per_step > held_out.champion_accepted_per_step + settings.gate_margin
    not_ = "" if better else "not "
    return Verdict(better, f"{figures}: {not_}better by more than promoter.gate_margin {settings.gate_margin:g}")


def is_worth_registering(current: float, champion: float, last: float | None) -> bool:
    """Return whether the weights in training deserve a version of their own.

    Args:
        current: Their accepted tokens per step on the held-out set.
        champion: The champion's on the same samples.
        last: That of the version registered last; None if that version cannot be promoted any more, so that the weights
            need only beat the champion.
    """
    return current > (champion if last is None else last)
