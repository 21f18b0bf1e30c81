"""Decide the next action on a line: pure functions of the recorded moves and the live figures.

    candidate ──gate──▶ canary ──canary analysis──▶ champion ──post-promotion watch──▶ anchor
                          │                            │
                          └────────── worse ───────────┴──▶ rolled back, and into quarantine

If ``canary.share`` is 0, there is no canary analysis, and the gate alone makes a candidate champion. Every poll decides
from scratch. Recorded moves and intents hold the start of a canary analysis or watch, the versions that had one, and
the number of rollbacks; the traces hold the figures of versions.

A version may be champion for less than a minute, which is too short to judge it, and each of many versions may lose
less than a comparison with the one before can show. So a watch compares all versions that were promoted since the
*anchor*, taken together, with the anchor, which nodes serve in a share of their time slices meanwhile. The alias
``previous`` names the anchor: a watch runs while it names another version than ``champion``, and ends when it is moved
there, or ``champion`` back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from schemas.events import Alias, AliasIntent, AliasMoved
from schemas.settings import Canary, Promoter
from trainer.release.gate import Verdict
from trainer.release.live_figures import ServingPeriod
from trainer.release.sequential_test import Comparison, Criteria, decide, find_below_margin

ACTOR = "promoter"
"""Actor of the promoter's own moves in the audit log."""
WATCH_MIN_GROUPS = 10
"""Slices that a watch needs on each side. Fewer than in a canary analysis, as a bad champion serves most traffic."""


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
    def sides(self) -> tuple[tuple[ServingPeriod, ...], tuple[ServingPeriod, ...]]:
        """Periods of both versions that are compared."""
        return (ServingPeriod(self.version, self.since),), (ServingPeriod(self.baseline, self.since),)


@dataclass(frozen=True, slots=True)
class PostPromotionWatch:
    """The versions promoted since the anchor, taken together, compared with the anchor, both serving at the same time;
    Unix seconds.
    """

    promoted: tuple[ServingPeriod, ...]
    """Oldest first, each since its promotion; the last one is champion."""
    baseline: str
    """The anchor."""
    until: float

    @property
    def version(self) -> str:
        """The champion."""
        return self.promoted[-1].version

    @property
    def since(self) -> float:
        """Time of the first promotion."""
        return self.promoted[0].since

    @property
    def sides(self) -> tuple[tuple[ServingPeriod, ...], tuple[ServingPeriod, ...]]:
        """Periods of both sides that are compared."""
        return self.promoted, (ServingPeriod(self.baseline, self.since),)


@dataclass(frozen=True, slots=True)
class LiveComparisons:
    """The running canary analysis and watch of a line with their figures."""

    canary: tuple[CanaryAnalysis, Comparison] | None = None
    watch: tuple[PostPromotionWatch, Comparison] | None = None


@dataclass(frozen=True, slots=True)
class NextAction:
    """Next action on a line."""

    kind: Literal["promote", "start_canary", "end_canary", "end_watch", "rollback", "wait"]
    why: str
    version: str | None = None
    """The version that is promoted, analysed, made the anchor or rolled back."""
    quarantine: bool = False
    """Whether the version must never be promoted again."""
    figures: Mapping[str, float] = field(default_factory=dict)


def canary_criteria(settings: Promoter) -> Criteria:
    """Return the criteria of a canary analysis."""
    return Criteria(settings.canary_margin, settings.canary_error, settings.canary_min_requests)


def watch_criteria(settings: Promoter) -> Criteria:
    """Return the criteria of a watch. Watches follow one another all day, so each has a tenth of an analysis' error."""
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


def find_watch(state: LineState, settings: Promoter) -> PostPromotionWatch | None:
    """Return the watch of the versions that were promoted since the anchor; it may have lasted too long.

    It began with the first of these promotions, or with a later move of ``previous``. None without such a promotion,
    while the last move is not recorded, and while the anchor is in quarantine.
    """
    anchor, champion = state.aliases.get("previous"), state.aliases.get("champion")
    to_anchor, to_champion = _last_move(state.moves, "previous"), _last_move(state.moves, "champion")
    if anchor is None or champion in {None, anchor} or anchor in state.quarantined:
        return None
    if to_anchor is None or to_champion is None or (to_anchor.to_version, to_champion.to_version) != (anchor, champion):
        return None
    since = to_anchor.time.timestamp()
    promoted = [
        ServingPeriod(move.to_version, max(move.time.timestamp(), since))
        for move in _promotions_since(state.moves, anchor)
        if move.to_version is not None
    ]
    return PostPromotionWatch(tuple(promoted), anchor, promoted[0].since + settings.watch_duration)


def choose_action(
    state: LineState, live: LiveComparisons, now: float, canary: Canary, settings: Promoter
) -> NextAction:
    """Return the next action on a line.

    Args:
        state: Recorded state of the line.
        live: Its canary analysis and watch.
        now: Unix time.
        canary: Of its shares, 0 disables canary analysis or watch.
        settings: Criteria and durations.
    """
    if canary.anchor_share and (ended := _end_watch(state, live, now, settings)) is not None:
        return ended
    cooldown_until = find_cooldown_end(state.intents, now, settings)
    if canary.share and (version := state.aliases.get("canary")) is not None:
        return _choose_for_canary(version, state, live, now, cooldown_until, settings)
    return _choose_for_candidate(state, canary.share, cooldown_until)


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


def _end_watch(state: LineState, live: LiveComparisons, now: float, settings: Promoter) -> NextAction | None:
    """Return the action that ends the watch of a line, or None if none runs or it continues."""
    champion, anchor = state.aliases.get("champion"), state.aliases.get("previous")
    if anchor in state.quarantined and champion not in {None, anchor}:
        return NextAction("end_watch", f"anchor {anchor} is in quarantine", champion)
    if live.watch is None:
        watch = find_watch(state, settings)
        if watch is None or now < watch.until:
            return None
        why = f"version {watch.version} stays: undecided against anchor {watch.baseline} after promoter.watch_duration"
        return NextAction("end_watch", why, watch.version)
    watch, comparison = live.watch
    outcome, why = decide(comparison, watch_criteria(settings))
    figures, count = collect_figures(comparison), len(watch.promoted)
    why = f"{count} version{'s' if count > 1 else ''} up to {watch.version} against anchor {watch.baseline}: {why}"
    if outcome == "rollback":
        return NextAction("rollback", why, watch.version, quarantine=True, figures=figures)
    return NextAction("end_watch", why, watch.version, figures=figures) if outcome == "promote" else None


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


def _promotions_since(moves: Sequence[AliasMoved], anchor: str) -> list[AliasMoved]:
    """Return the recorded moves of ``champion`` since it last named the anchor, oldest first.

    Moves that follow one another between two polls are recorded as one: the anchor may be missing where a move began.
    """
    since: list[AliasMoved] = []
    for move in moves:
        if move.alias == "champion":
            since = [move] if move.from_version == anchor else [*since, move]
    return since


def _last_move(moves: Sequence[AliasMoved], alias: Alias) -> AliasMoved | None:
    return next((move for move in reversed(moves) if move.alias == alias), None)


def _had_alias(moves: Sequence[AliasMoved], alias: Alias, version: str) -> bool:
    """Return whether an alias ever named a version."""
    return any(move.alias == alias and move.to_version == version for move in moves)
