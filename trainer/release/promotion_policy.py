"""Decide the next action on a line: pure functions of the recorded moves and the live figures.

    candidate ──gate──▶ canary ──canary analysis──▶ champion ──post-promotion watch──▶ stays
                          │                            │
                          └────────── worse ───────────┴──▶ rolled back, and into quarantine

If ``canary.share`` is 0, there is no canary analysis, and the gate alone makes a candidate champion. Every poll decides
from scratch. Recorded moves and intents hold the start of a canary analysis or watch, the versions that had one, and
the number of rollbacks; the traces hold the figures of versions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from schemas.events import Alias, AliasIntent, AliasMoved
from schemas.settings import Promoter
from trainer.release.gate import Verdict
from trainer.release.live_figures import ServingPeriod
from trainer.release.sequential_test import Comparison, Criteria, Estimate, decide, describe, find_below_margin

ACTOR = "promoter"
"""Actor of the promoter's own moves in the audit log."""
WATCH_MIN_GROUPS = 10
"""Slices that a watch needs of both versions: the drop it looks for is much larger than that of a canary analysis."""


@dataclass(frozen=True, slots=True)
class LineState:
    """Recorded state of a line, and the verdict of the gate on its candidate."""

    aliases: Mapping[str, str]
    moves: Sequence[AliasMoved]
    """Oldest first, and up to date."""
    intents: Sequence[tuple[AliasIntent, str]]
    quarantined: Collection[str]
    """Among the versions with an alias."""
    gate: Verdict


@dataclass(frozen=True, slots=True)
class CanaryAnalysis:
    """A canary compared with the champion, both serving at the same time; Unix seconds."""

    version: str
    baseline: str
    since: float
    until: float

    @property
    def periods(self) -> tuple[ServingPeriod, ServingPeriod]:
        """Periods of both versions that are compared."""
        return ServingPeriod(self.version, self.since), ServingPeriod(self.baseline, self.since)


@dataclass(frozen=True, slots=True)
class PostPromotionWatch:
    """A new champion compared with the one before, which served until the promotion; Unix seconds."""

    version: str
    baseline: str
    since: float
    until: float

    @property
    def periods(self) -> tuple[ServingPeriod, ServingPeriod]:
        """Periods of both versions that are compared: as long before the promotion as after it."""
        length = self.until - self.since
        return (
            ServingPeriod(self.version, self.since),
            ServingPeriod(self.baseline, self.since - length, self.since),
        )


@dataclass(frozen=True, slots=True)
class LiveComparisons:
    """The running canary analysis and watch of a line with their figures."""

    canary: tuple[CanaryAnalysis, Comparison] | None = None
    watch: tuple[PostPromotionWatch, Comparison] | None = None


@dataclass(frozen=True, slots=True)
class NextAction:
    """Next action on a line."""

    kind: Literal["promote", "start_canary", "end_canary", "rollback", "wait"]
    why: str
    version: str | None = None
    """The version that is promoted, analysed or rolled back."""
    quarantine: bool = False
    """Whether the version must never be promoted again."""
    figures: Mapping[str, float] = field(default_factory=dict)


def canary_criteria(settings: Promoter) -> Criteria:
    """Return the criteria of a canary analysis."""
    return Criteria(settings.canary_margin, settings.canary_error, settings.canary_min_requests)


def watch_criteria(settings: Promoter) -> Criteria:
    """Return the criteria of a watch; it looks at each label on its own, at a tenth of the canary analysis' error."""
    return Criteria(
        1 - settings.watch_min_ratio, settings.canary_error / 10, settings.watch_min_requests, WATCH_MIN_GROUPS
    )


def find_canary_analysis(state: LineState, settings: Promoter) -> CanaryAnalysis | None:
    """Return the running canary analysis, which began with the last move of canary or champion.

    None while that move is not recorded.
    """
    canary, champion = state.aliases.get("canary"), state.aliases.get("champion")
    if canary is None or champion is None or canary == champion:
        return None
    to_canary, to_champion = _last_move(state.moves, "canary"), _last_move(state.moves, "champion")
    if to_canary is None or to_champion is None:
        return None
    if (to_canary.to_version, to_champion.to_version) != (canary, champion):
        return None
    since = max(to_canary.time, to_champion.time).timestamp()
    return CanaryAnalysis(canary, champion, since, since + settings.canary_timeout)


def find_watch(state: LineState, now: float, settings: Promoter) -> PostPromotionWatch | None:
    """Return the running watch: after a promotion, while there is a version to roll back to."""
    promoted, previous = _last_move(state.moves, "champion"), state.aliases.get("previous")
    if promoted is None or previous is None or promoted.from_version != previous:
        return None
    since = promoted.time.timestamp()
    if now >= since + settings.watch_duration or promoted.to_version is None or previous in state.quarantined:
        return None
    return PostPromotionWatch(promoted.to_version, previous, since, since + settings.watch_duration)


def choose_action(
    state: LineState, live: LiveComparisons, now: float, canary_share: float, settings: Promoter
) -> NextAction:
    """Return the next action on a line.

    Args:
        state: Recorded state of the line.
        live: Its canary analysis and watch.
        now: Unix time.
        canary_share: ``canary.share``; 0 disables canary analysis.
        settings: Criteria and durations.
    """
    if live.watch is not None and (drop := find_drop(live.watch[1], settings)) is not None:
        watch, comparison = live.watch
        why = (
            f"version {watch.version} fell below promoter.watch_min_ratio of version {watch.baseline}: {describe(drop)}"
        )
        return NextAction("rollback", why, watch.version, quarantine=True, figures=collect_figures(comparison))
    cooldown_until = find_cooldown_end(state.intents, now, settings)
    if canary_share and (canary := state.aliases.get("canary")) is not None:
        return _choose_for_canary(canary, state, live, now, cooldown_until, settings)
    return _choose_for_candidate(state, canary_share, cooldown_until)


def find_drop(comparison: Comparison, settings: Promoter) -> Estimate | None:
    """Return an estimate whose whole interval lies below ``promoter.watch_min_ratio``.

    Acceptance length counts overall and on each label. Tokens per second, which drop with the load of an hour, count
    only if acceptance length has dropped too.
    """
    if not comparison.enough:
        return None
    floor = settings.watch_min_ratio - 1
    estimates = (*comparison.overall, *comparison.labels)
    lengths = {one.label: one for one in estimates if one.figure == "acceptance length"}
    return next(
        (
            one
            for one in estimates
            if one.high < floor and (one.figure == "acceptance length" or lengths[one.label].high < 0)
        ),
        None,
    )


def find_cooldown_end(intents: Sequence[tuple[AliasIntent, str]], now: float, settings: Promoter) -> float | None:
    """Return the Unix time until which nothing is promoted after automatic rollbacks of champions, or None.

    Each further rollback within ``promoter.cooldown_window`` doubles the cooldown.
    """
    times = [
        intent.time.timestamp()
        for intent, state in intents
        if intent.action == "rollback" and intent.actor == ACTOR and state == "done"
    ]
    recent = [time for time in times if now - time < settings.cooldown_window]
    if not recent:
        return None
    until = recent[-1] + settings.cooldown * 2.0 ** (len(recent) - 1)
    return until if until > now else None


def find_last_rollback(intents: Sequence[tuple[AliasIntent, str]]) -> str | None:
    """Return why the promoter last rolled a version back, as canary or as champion."""
    reasons = [one.why for one, _ in intents if one.action in ("rollback", "end_canary") and one.actor == ACTOR]
    return reasons[-1] if reasons else None


def collect_figures(comparison: Comparison) -> dict[str, float]:
    """Return the numbers of a comparison, for audit rows and events."""
    figures = {"requests": float(comparison.new_requests), "requests_before": float(comparison.old_requests)}
    several = comparison.labels if len(comparison.labels) > len(comparison.overall) else ()
    for one in (*comparison.overall, *several):
        name = one.figure.replace(" ", "_") + ("" if one.label is None else f"/{one.label}")
        values = {"": one.new, "_before": one.old, "_difference": one.difference, "_low": one.low, "_high": one.high}
        figures |= {f"{name}{suffix}": round(value, 6) for suffix, value in values.items()}
    return figures


def _choose_for_canary(
    canary: str, state: LineState, live: LiveComparisons, now: float, cooldown_until: float | None, settings: Promoter
) -> NextAction:
    if canary in state.quarantined:
        return NextAction("end_canary", f"version {canary} is in quarantine", canary)
    if state.aliases.get("champion") in (None, canary):
        return NextAction("end_canary", f"version {canary} has no other champion to be compared with", canary)
    if live.canary is None:
        return NextAction("wait", f"the canary analysis of version {canary} is not recorded yet")
    return _end_or_continue(*live.canary, now, cooldown_until, settings)


def _end_or_continue(
    analysis: CanaryAnalysis, comparison: Comparison, now: float, cooldown_until: float | None, settings: Promoter
) -> NextAction:
    canary, criteria = analysis.version, canary_criteria(settings)
    outcome, why = decide(comparison, criteria)
    figures, why = collect_figures(comparison), f"version {canary} against {analysis.baseline}: {why}"
    if outcome == "rollback":
        return NextAction("end_canary", why, canary, quarantine=True, figures=figures)
    timed_out = outcome == "continue" and now >= analysis.until
    by_estimate = settings.canary_on_timeout == "estimate" and comparison.enough
    if outcome == "promote" or (timed_out and by_estimate and find_below_margin(comparison, criteria) is None):
        if cooldown_until is not None:
            return NextAction("wait", f"{why}; {_describe_cooldown(cooldown_until)}")
        why = f"{why}; after promoter.canary_timeout, by estimate" if timed_out else why
        return NextAction("promote", why, canary, figures=figures)
    if timed_out:
        return NextAction("end_canary", f"{why}; undecided after promoter.canary_timeout", canary, figures=figures)
    return NextAction("wait", why)


def _choose_for_candidate(state: LineState, canary_share: float, cooldown_until: float | None) -> NextAction:
    candidate, why = state.aliases.get("candidate"), state.gate.why
    if candidate is None or not state.gate.promote:
        return NextAction("wait", why)
    if _had_alias(state.moves, "champion", candidate):
        return NextAction("wait", f"version {candidate} was champion and was rolled back")
    needs_canary = canary_share > 0 and state.aliases.get("champion") is not None
    if needs_canary and _had_alias(state.moves, "canary", candidate):
        again = f"`aurora versions promote {candidate} --to canary` starts another"
        return NextAction("wait", f"version {candidate} had its canary analysis; {again}")
    if cooldown_until is not None:
        return NextAction("wait", f"{why}; {_describe_cooldown(cooldown_until)}")
    return NextAction("start_canary" if needs_canary else "promote", why, candidate)


def _describe_cooldown(until: float) -> str:
    return f"nothing is promoted before {datetime.fromtimestamp(until, UTC):%H:%M:%S} UTC (promoter.cooldown)"


def _last_move(moves: Sequence[AliasMoved], alias: Alias) -> AliasMoved | None:
    return next((move for move in reversed(moves) if move.alias == alias), None)


def _had_alias(moves: Sequence[AliasMoved], alias: Alias, version: str) -> bool:
    """Return whether an alias ever named a version."""
    return any(move.alias == alias and move.to_version == version for move in moves)
