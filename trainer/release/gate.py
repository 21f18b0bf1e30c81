"""Who may become candidate and who champion: decisions over accept lengths on the held-back slice, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.events import QUARANTINED_TAG
from schemas.settings import DAY_0, Promoter


class OnLabel(BaseModel):
    """Figures of both on the held-back windows of one label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str | None
    """Empty for traffic without one; None for all labels with too few windows of their own, taken together."""
    accept_length: float
    champion_accept_length: float
    windows: int

    def __str__(self) -> str:
        name = "the other labels" if self.label is None else f"label {self.label or 'none'}"
        return f"{name} {self.accept_length:.3f} against {self.champion_accept_length:.3f} on {self.windows} windows"


class HeldBack(BaseModel):
    """Figures of a version against the champion of that moment, on the same windows: its tag ``held_back``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accept_length: float
    champion: str
    """Version that was champion, or one of day 0."""
    champion_accept_length: float
    windows: int
    labels: tuple[OnLabel, ...] = ()

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> HeldBack:
        """The figures in a version's tags.

        Raises:
            ValidationError: the tag is missing or malformed.
        """
        return cls.model_validate_json(tags.get("held_back", ""))

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

    def lost(self, margin: float, min_windows: int) -> OnLabel | None:
        """The label on which it is behind the champion most, if that is by more than the margin."""
        told = [label for label in self.labels if label.windows >= min_windows]
        worst = min(told, key=lambda on: on.accept_length - on.champion_accept_length, default=None)
        if worst is None or worst.accept_length >= worst.champion_accept_length - margin:
            return None
        return worst


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a candidate."""

    promote: bool
    why: str


def judge(candidate: str | None, champion: str | None, tags: Mapping[str, str], settings: Promoter) -> Verdict:
    """Whether the candidate is better than the champion on the held-back slice, and on none of its labels worse.

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
        held_back = HeldBack.of(tags)
    except ValidationError as error:
        return Verdict(promote=False, why=f"version {candidate}: tag held_back: {error.errors()[0]['msg']}")
    return _compared(candidate, champion, held_back, settings)


def _compared(candidate: str, champion: str | None, held_back: HeldBack, settings: Promoter) -> Verdict:
    figures = (
        f"version {candidate} {held_back.accept_length:.3f} against {held_back.champion} "
        f"{held_back.champion_accept_length:.3f} on {held_back.windows} windows"
    )
    if not held_back.is_against(champion):
        return Verdict(promote=False, why=f"{figures}: champion is {champion or DAY_0}, waiting for the next candidate")
    if held_back.windows < settings.min_windows:
        return Verdict(promote=False, why=f"{figures}: promoter.min_windows asks for {settings.min_windows}")
    if lost := held_back.lost(settings.label_margin, settings.label_windows):
        why = f"{figures}: worse by more than promoter.label_margin {settings.label_margin:g} on {lost}"
        return Verdict(promote=False, why=why)
    better = held_back.accept_length > held_back.champion_accept_length + settings.margin
    not_ = "" if better else "not "
    return Verdict(better, f"{figures}: {not_}better by more than promoter.margin {settings.margin:g}")


def worth_registering(now: float, champion: float, candidate: float | None) -> bool:
    """Whether the weights in training deserve a version of their own.

    Args:
        now: Their accept length on the held-back slice.
        champion: The champion's on the same windows.
        candidate: That of the version registered last; None if there is none that could still be promoted, and the
            weights need only beat the champion.
    """
    return now > (champion if candidate is None else candidate)
