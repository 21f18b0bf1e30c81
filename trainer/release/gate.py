"""Who may become candidate and who champion: decisions over accepted tokens per step on the held-out set, without
I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.events import QUARANTINED_TAG
from schemas.settings import DAY_0, Promoter


class OnLabel(BaseModel):
    """Figures of both on the held-out windows of one label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str | None
    """Empty for traffic without one; None for all labels with too few windows of their own, taken together."""
    accepted_per_step: float
    champion_accepted_per_step: float
    windows: int

    def __str__(self) -> str:
        name = "the other labels" if self.label is None else f"label {self.label or 'none'}"
        figures = f"{self.accepted_per_step:.3f} against {self.champion_accepted_per_step:.3f}"
        return f"{name} {figures} on {self.windows} windows"


class HeldOut(BaseModel):
    """Figures of a version against the champion of that moment, on the same windows: its tag ``held_out``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accepted_per_step: float
    champion: str
    """Version that was champion, or one of day 0."""
    champion_accepted_per_step: float
    windows: int
    labels: tuple[OnLabel, ...] = ()

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> HeldOut:
        """The figures in a version's tags.

        Raises:
            ValidationError: the tag is missing or malformed.
        """
        return cls.model_validate_json(tags.get("held_out", ""))

    def is_against(self, champion: str | None) -> bool:
        """Whether it was compared with this champion; None is day 0."""
        return self.champion.startswith(DAY_0) if champion is None else self.champion == champion

    @property
    def figures(self) -> dict[str, float]:
        """The numbers, for audit rows and events."""
        by_label = {
            f"{name}/{label.label}": value
            for label in self.labels
            if label.label is not None
            for name, value in label.model_dump(exclude={"label", "windows"}).items()
        }
        return self.model_dump(exclude={"champion", "labels"}) | by_label

    def lost(self, margin: float, gate_min_samples: int) -> OnLabel | None:
        """The label on which it is behind the champion most, if that is by more than the margin."""
        told = [label for label in self.labels if label.windows >= gate_min_samples]
        worst = min(told, key=lambda on: on.accepted_per_step - on.champion_accepted_per_step, default=None)
        if worst is None or worst.accepted_per_step >= worst.champion_accepted_per_step - margin:
            return None
        return worst


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a candidate."""

    promote: bool
    why: str


def judge(candidate: str | None, champion: str | None, tags: Mapping[str, str], settings: Promoter) -> Verdict:
    """Whether the candidate is better than the champion on the held-out set, and on none of its labels worse.

    Args:
        candidate: Version that the alias ``candidate`` names.
        champion: Version that the alias ``champion`` names; None while nodes draft with day 0.
        tags: The candidate's tags.
        settings: Margins, and the windows that a comparison needs.
    """
    if candidate is None or candidate == champion:
        return Verdict(promote=False, why="no candidate" if candidate is None else f"version {candidate} is champion")
    if why := tags.get(QUARANTINED_TAG):
        return Verdict(promote=False, why=f"version {candidate} is in quarantine: {why}")
    try:
        held_out = HeldOut.of(tags)
    except ValidationError as error:
        return Verdict(promote=False, why=f"version {candidate}: tag held_out: {error.errors()[0]['msg']}")
    return _compared(candidate, champion, held_out, settings)


def _compared(candidate: str, champion: str | None, held_out: HeldOut, settings: Promoter) -> Verdict:
    figures = (
        f"version {candidate} {held_out.accepted_per_step:.3f} against {held_out.champion} "
        f"{held_out.champion_accepted_per_step:.3f} on {held_out.windows} windows"
    )
    if not held_out.is_against(champion):
        return Verdict(promote=False, why=f"{figures}: champion is {champion or DAY_0}, waiting for the next candidate")
    if held_out.windows < settings.gate_min_samples:
        return Verdict(promote=False, why=f"{figures}: promoter.gate_min_samples asks for {settings.gate_min_samples}")
    if lost := held_out.lost(settings.gate_label_margin, settings.gate_label_min_samples):
        why = f"{figures}: worse by more than promoter.gate_label_margin {settings.gate_label_margin:g} on {lost}"
        return Verdict(promote=False, why=why)
    better = held_out.accepted_per_step > held_out.champion_accepted_per_step + settings.gate_margin
    not_ = "" if better else "not "
    return Verdict(better, f"{figures}: {not_}better by more than promoter.gate_margin {settings.gate_margin:g}")


def worth_registering(now: float, champion: float, candidate: float | None) -> bool:
    """Whether the weights in training deserve a version of their own.

    Args:
        now: Their accepted tokens per step on the held-out set.
        champion: The champion's on the same windows.
        candidate: That of the version registered last; None if there is none that could still be promoted, and the
            weights need only beat the champion.
    """
    return now > (champion if candidate is None else candidate)
