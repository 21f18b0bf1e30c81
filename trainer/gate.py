"""Who may become candidate and who champion: decisions over accept lengths on the held-back slice, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

DAY_0 = "random"
"""Versions of day 0 begin with it: they are in no registry."""


class HeldBack(BaseModel):
    """Figures of a version against the champion of that moment, on the same windows: its tag ``held_back``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accept_length: float
    champion: str
    """Version that was champion, or one of day 0."""
    champion_accept_length: float
    windows: int

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
        return self.model_dump(exclude={"champion"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of a candidate."""

    promote: bool
    why: str


def judge(
    candidate: str | None, champion: str | None, tags: Mapping[str, str], margin: float, min_windows: int
) -> Verdict:
    """Whether the candidate takes the champion's place.

    Args:
        candidate: Version that the alias ``candidate`` names.
        champion: Version that the alias ``champion`` names; None while nodes draft with day 0.
        tags: The candidate's tags.
        margin: Accept length by which it must be better.
        min_windows: Held-back windows that the comparison needs.
    """
    if candidate is None or candidate == champion:
        return Verdict(promote=False, why="no candidate" if candidate is None else f"version {candidate} is champion")
    try:
        held_back = HeldBack.of(tags)
    except ValidationError as error:
        return Verdict(promote=False, why=f"version {candidate}: tag held_back: {error.errors()[0]['msg']}")
    figures = (
        f"version {candidate} {held_back.accept_length:.3f} against {held_back.champion} "
        f"{held_back.champion_accept_length:.3f} on {held_back.windows} windows"
    )
    if not held_back.is_against(champion):
        return Verdict(promote=False, why=f"{figures}: champion is {champion or DAY_0}, waiting for the next candidate")
    if held_back.windows < min_windows:
        return Verdict(promote=False, why=f"{figures}: promoter.min_windows asks for {min_windows}")
    better = held_back.accept_length > held_back.champion_accept_length + margin
    return Verdict(better, f"{figures}: {'' if better else 'not '}better by more than promoter.margin {margin:g}")


def worth_registering(now: float, champion: float, candidate: float | None) -> bool:
    """Whether the weights in training deserve a version of their own.

    Args:
        now: Their accept length on the held-back slice.
        champion: The champion's on the same windows.
        candidate: That of the version registered last; None if there is none that could still be promoted, and the
            weights need only beat the champion.
    """
    return now > (champion if candidate is None else candidate)
