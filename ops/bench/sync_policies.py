"""What a node would have output had it taken newer versions over by some policy. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from schemas.settings import Update
from serving.versions.update_policy import Reading, SyncPolicy

Lengths = Callable[[int, int], float]
"""The accepted tokens per step of a version on a block of the traffic; version ``b`` has learned from the blocks
before ``b``.
"""


@dataclass(frozen=True, slots=True)
class Costs:
    """What serving takes on this machine, in seconds."""

    verify_step_s: float
    """Of a verify step of one request, its share of the batch's time."""
    pause_s: float
    """Of a swap."""
    fetch_s: float
    """What reading and checking a version takes from the verify steps."""

    @property
    def takeover_s(self) -> float:
        """Serving time that a takeover costs."""
        return self.pause_s + self.fetch_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a policy did over the traffic."""

    name: str
    interval_s: float
    """Set, or what ``auto`` came to in the end."""
    takeovers: int
    accepted: float
    """Drafted tokens that the target kept."""
    serving_s: float
    """Takeovers included."""
    swapping_s: float

    @property
    def overhead(self) -> float:
        """Share of the serving time that takeovers took."""
        return self.swapping_s / self.serving_s


def serve(name: str, sync: Update, answered: Sequence[int], lengths: Lengths, costs: Costs) -> Outcome:
    """Serve blocks of so many answered tokens, each by the version that the policy has come to at its beginning."""
    policy, now, served, behind_since = SyncPolicy(sync, name), 0.0, 0, None
    verify_steps = accepted = swapping_s = 0.0
    takeovers = 0

    def reading() -> Reading:
        return Reading(now, round(verify_steps), round(accepted), round(verify_steps + accepted))

    for newest, tokens in enumerate(answered):
        policy.read(reading())
        if newest > served:
            behind_since = now if behind_since is None else behind_since
            if now >= policy.due_at(str(newest), behind_since):
                now += costs.takeover_s
                swapping_s += costs.takeover_s
                policy.swapped()
                policy.taken(reading(), reading(), costs.takeover_s)
                served, behind_since, takeovers = newest, None, takeovers + 1
                policy.read(reading())
        of_block = tokens / (1 + lengths(served, newest))
        verify_steps, accepted, now = (
            verify_steps + of_block,
            accepted + tokens - of_block,
            now + of_block * costs.verify_step_s,
        )
    return Outcome(name, policy.interval_s, takeovers, accepted, now, swapping_s)


def swept(answered: Sequence[int], lengths: Lengths, costs: Costs, auto: Update) -> list[Outcome]:
    """Every version, ever fewer of them, none at all, and ``auto``."""
    every = serve("every version", Update(min_interval=0, jitter=0), answered, lengths, costs)
    period_s = every.serving_s / len(answered)
    outcomes = [every]
    factor = 2
    while factor < len(answered):
        # Half a period less than a multiple of it, so that blocks of other lengths do not miss their turn.
        interval_s = round((factor - 0.5) * period_s, 1)
        fixed = Update(min_interval=interval_s, jitter=0, max_staleness=every.serving_s * len(answered))
        outcomes.append(serve(f"at most every {interval_s:g} s", fixed, answered, lengths, costs))
        factor *= 2
    by_itself = auto.model_copy(update={"min_interval": "auto", "jitter": 0.0})
    return [*outcomes, _never(answered, lengths, costs), serve("auto", by_itself, answered, lengths, costs)]


def kept(outcome: Outcome, every: Outcome) -> float:
    """Accepted tokens over those of a node that follows every version."""
    return outcome.accepted / every.accepted if every.accepted else 1.0


def net(outcome: Outcome, every: Outcome) -> float:
    """Output per second over that of a node that follows every version at no cost."""
    return (every.serving_s - every.swapping_s) / outcome.serving_s


def _never(answered: Sequence[int], lengths: Lengths, costs: Costs) -> Outcome:
    verify_steps = [tokens / (1 + lengths(0, block)) for block, tokens in enumerate(answered)]
    return Outcome(
        "never", float("inf"), 0, sum(answered) - sum(verify_steps), sum(verify_steps) * costs.verify_step_s, 0.0
    )
