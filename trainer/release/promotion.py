"""How a version becomes champion, and what takes it back: decided anew in every pass, without I/O.

    candidate ──gate──▶ canary ──trial──▶ champion ──watch──▶ stays
                          │                  │
                          └── worse ─────────┴── fallen ──▶ back, and into quarantine

Where ``canary.share`` is 0 there are no trials, and the gate alone makes a candidate champion. Nothing is remembered:
since when a trial or a watch runs, what had its turn, and how often a champion was taken back stand in the recorded
moves and intents; what versions do stands in the traces.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from schemas.events import Alias, AliasIntent, AliasMoved
from schemas.settings import Promoter
from trainer.release.gate import Verdict
from trainer.release.live_figures import Span
from trainer.release.sequential_test import Estimate, Rule, Standing, bound, decide, told

ACTOR = "promoter"
"""Who moves aliases here, in the record."""
WATCH_GROUPS = 10
"""Slices that a watch needs of both versions: a fall is much larger than what a trial looks for."""


@dataclass(frozen=True, slots=True)
class Written:
    """What is written down of a line, and what the gate says of its candidate."""

    aliases: Mapping[str, str]
    moves: Sequence[AliasMoved]
    """Oldest first, and up to date."""
    intents: Sequence[tuple[AliasIntent, str]]
    quarantined: Collection[str]
    """Of the versions that aliases name."""
    gate: Verdict


@dataclass(frozen=True, slots=True)
class Trial:
    """A canary beside the champion; Unix seconds."""

    version: str
    against: str
    since: float
    until: float

    @property
    def spans(self) -> tuple[Span, Span]:
        """What is compared."""
        return Span(self.version, self.since), Span(self.against, self.since)


@dataclass(frozen=True, slots=True)
class Watch:
    """A new champion, beside what the one before did until then; Unix seconds."""

    version: str
    before: str
    since: float
    until: float

    @property
    def spans(self) -> tuple[Span, Span]:
        """What is compared: as much of the past as there is of the future."""
        length = self.until - self.since
        return Span(self.version, self.since), Span(self.before, self.since - length, self.since)


@dataclass(frozen=True, slots=True)
class Seen:
    """How a trial and a watch stand, where there are any."""

    trial: tuple[Trial, Standing] | None = None
    watch: tuple[Watch, Standing] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What to do next with a line."""

    what: Literal["promote", "start_canary", "end_canary", "rollback", "wait"]
    why: str
    version: str | None = None
    """The version that it is about: that is promoted, tried, or taken back."""
    quarantine: bool = False
    """Whether that version must never be taken again."""
    figures: Mapping[str, float] = field(default_factory=dict)


def trial_rule(settings: Promoter) -> Rule:
    """What a trial asks for."""
    return Rule(settings.canary_margin, settings.canary_error, settings.canary_min_requests)


def watch_rule(settings: Promoter) -> Rule:
    """What a watch asks for; it looks at each label for itself, and errs ten times more seldom than a trial."""
    return Rule(1 - settings.watch_min_ratio, settings.canary_error / 10, settings.watch_min_requests, WATCH_GROUPS)


def trial_of(written: Written, settings: Promoter) -> Trial | None:
    """The trial that runs, since canary and champion are what they are; None while that is not recorded."""
    canary, champion = written.aliases.get("canary"), written.aliases.get("champion")
    if canary is None or champion is None or canary == champion:
        return None
    tried, beside = _last(written.moves, "canary"), _last(written.moves, "champion")
    if tried is None or beside is None or (tried.to_version, beside.to_version) != (canary, champion):
        return None
    since = max(tried.time, beside.time).timestamp()
    return Trial(canary, champion, since, since + settings.canary_timeout)


def watch_of(written: Written, now: float, settings: Promoter) -> Watch | None:
    """The watch that runs: after a promotion, while there is a version to go back to."""
    promoted, previous = _last(written.moves, "champion"), written.aliases.get("previous")
    if promoted is None or previous is None or promoted.from_version != previous:
        return None
    since = promoted.time.timestamp()
    if now >= since + settings.watch_duration or promoted.to_version is None or previous in written.quarantined:
        return None
    return Watch(promoted.to_version, previous, since, since + settings.watch_duration)


def next_step(written: Written, seen: Seen, now: float, share: float, settings: Promoter) -> Step:
    """What to do next.

    Args:
        written: What is written down of the line.
        seen: How its trial and its watch stand.
        now: Unix time.
        share: ``canary.share``; 0 holds no trials.
        settings: What is asked for.
    """
    if seen.watch is not None and (fall := fallen(seen.watch[1], settings)) is not None:
        watch, standing = seen.watch
        why = f"version {watch.version} fell below promoter.watch_min_ratio of version {watch.before}: {told(fall)}"
        return Step("rollback", why, watch.version, quarantine=True, figures=figures_of(standing))
    cooling = cooling_until(written.intents, now, settings)
    if share and (canary := written.aliases.get("canary")) is not None:
        return _of_canary(canary, written, seen, now, cooling, settings)
    return _of_candidate(written, share, cooling)


def fallen(standing: Standing, settings: Promoter) -> Estimate | None:
    """The figure that lies below the floor with its whole interval.

    Tokens per verify step, over all labels or on one. Tokens per second, which fall with the load of an hour, only
    where
    tokens per verify step have fallen too.
    """
    if not standing.enough:
        return None
    floor = settings.watch_min_ratio - 1
    found = [one for one in (*standing.overall, *standing.labels) if one.high < floor]
    per_verify_step = {
        one.label: one for one in (*standing.overall, *standing.labels) if one.figure == "tokens per verify step"
    }
    return next(
        (one for one in found if one.figure == "tokens per verify step" or per_verify_step[one.label].high < 0), None
    )


def cooling_until(intents: Sequence[tuple[AliasIntent, str]], now: float, settings: Promoter) -> float | None:
    """Until when nothing is promoted because champions were taken back; each one within the memory doubles it."""
    times = [
        wanted.time.timestamp()
        for wanted, state in intents
        if wanted.action == "rollback" and wanted.actor == ACTOR and state == "done"
    ]
    recent = [time for time in times if now - time < settings.cooldown_window]
    if not recent:
        return None
    until = recent[-1] + settings.cooldown * 2.0 ** (len(recent) - 1)
    return until if until > now else None


def taken_back(intents: Sequence[tuple[AliasIntent, str]]) -> str | None:
    """Why a version was taken back last, as canary or as champion, without a person's hand."""
    ends = [
        wanted.why for wanted, _ in intents if wanted.action in ("rollback", "end_canary") and wanted.actor == ACTOR
    ]
    return ends[-1] if ends else None


def figures_of(standing: Standing) -> dict[str, float]:
    """The numbers of a comparison, for audit rows and events."""
    figures = {"requests": float(standing.new_requests), "requests_before": float(standing.old_requests)}
    several = standing.labels if len(standing.labels) > len(standing.overall) else ()
    for one in (*standing.overall, *several):
        name = one.figure.replace(" ", "_") + ("" if one.label is None else f"/{one.label}")
        values = {"": one.new, "_before": one.old, "_difference": one.difference, "_low": one.low, "_high": one.high}
        figures |= {f"{name}{suffix}": round(value, 6) for suffix, value in values.items()}
    return figures


def _of_canary(
    canary: str, written: Written, seen: Seen, now: float, cooling: float | None, settings: Promoter
) -> Step:
    """What becomes of a canary."""
    if written.aliases.get("champion") in (None, canary) or canary in written.quarantined:
        held = "is in quarantine" if canary in written.quarantined else "has no other champion beside it"
        return Step("end_canary", f"version {canary} {held}", canary)
    if seen.trial is None:
        return Step("wait", f"the trial of version {canary} is not recorded yet")
    return _of_trial(*seen.trial, now, cooling, settings)


def _of_trial(trial: Trial, standing: Standing, now: float, cooling: float | None, settings: Promoter) -> Step:
    """What a trial has come to."""
    canary = trial.version
    outcome, why = decide(standing, trial_rule(settings))
    figures, why = figures_of(standing), f"version {canary} against {trial.against}: {why}"
    if outcome == "back":
        return Step("end_canary", why, canary, quarantine=True, figures=figures)
    over = outcome == "go on" and now >= trial.until
    if outcome == "promote" or (over and _passes_by_estimate(standing, settings)):
        if cooling is not None:
            return Step("wait", f"{why}; {_cooling(cooling)}")
        return Step(
            "promote", f"{why}; after promoter.canary_timeout, by estimate" if over else why, canary, figures=figures
        )
    if over:
        return Step("end_canary", f"{why}; undecided after promoter.canary_timeout", canary, figures=figures)
    return Step("wait", why)


def _passes_by_estimate(standing: Standing, settings: Promoter) -> bool:
    by_estimate = settings.canary_on_timeout == "estimate" and standing.enough
    return by_estimate and bound(standing, trial_rule(settings)) is None


def _of_candidate(written: Written, share: float, cooling: float | None) -> Step:
    """What becomes of a candidate while there is no trial."""
    candidate, why = written.aliases.get("candidate"), written.gate.why
    if candidate is None or not written.gate.promote:
        return Step("wait", why)
    if _named(written.moves, "champion", candidate):
        return Step("wait", f"version {candidate} was champion and was taken back")
    tried = share > 0 and written.aliases.get("champion") is not None
    if tried and _named(written.moves, "canary", candidate):
        return Step(
            "wait", f"version {candidate} had its trial; `aurora promote {candidate} --to canary` gives another"
        )
    if cooling is not None:
        return Step("wait", f"{why}; {_cooling(cooling)}")
    return Step("start_canary" if tried else "promote", why, candidate)


def _cooling(until: float) -> str:
    return f"nothing is promoted before {datetime.fromtimestamp(until, UTC):%H:%M:%S} UTC (promoter.cooldown)"


def _last(moves: Sequence[AliasMoved], alias: Alias) -> AliasMoved | None:
    return next((move for move in reversed(moves) if move.alias == alias), None)


def _named(moves: Sequence[AliasMoved], alias: Alias, version: str) -> bool:
    """Whether an alias has ever named a version."""
    return any(move.alias == alias and move.to_version == version for move in moves)
