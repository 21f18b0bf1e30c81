"""Several requests at a time: what speculation brings by batch size, and whether the node chooses well how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ops.bench.paired import Figure, Goal, interleaved, ratio
from ops.bench.prompted import SAMPLED
from ops.bench.stand import Mode, Stand

_KINDS = {"greedy": 0.0, "sampled": SAMPLED}


def names(batches: tuple[int, ...], sweep_batches: tuple[int, ...]) -> list[str]:
    """The figures of this page; greedy at batch 1 is a single stream's."""
    speedups = [f"speculation_speedup_b{b}_{kind}" for b in batches for kind in _KINDS if (b, kind) != (1, "greedy")]
    penalties = [f"random_draft_penalty_b{b}" for b in batches if b != 1]
    return [*speedups, *penalties, *(f"adaptive_vs_best_fixed_b{b}" for b in sweep_batches)]


def speedups(stand: Stand, wanted: Callable[[str], bool]) -> Iterator[Figure]:
    """Tokens a second with the trained draft over those without speculation, and of those over a random draft's."""
    for batch in stand.plan.batches:
        for kind, temperature in _KINDS.items():
            speedup, penalty = f"speculation_speedup_b{batch}_{kind}", f"random_draft_penalty_b{batch}"
            with_penalty = kind == "greedy" and wanted(penalty)
            if batch == 1 and kind == "greedy":
                continue
            if not (wanted(speedup) or with_penalty):
                continue
            engine, mode = stand.engine(), Mode(batch, temperature)
            arms = {"ours": stand.arm(engine, Mode(batch, temperature, speculate=False))}
            if wanted(speedup):
                arms["speculating"] = stand.arm(engine, mode)
            if with_penalty:
                # In one engine: two differ by where their weights lie in memory, by more than this is about.
                arms["undrafted"] = stand.arm(stand.engine("random"), Mode(batch, temperature, speculate=False))
                arms["random"] = stand.arm(stand.engine("random"), mode)
            rates = interleaved(arms, stand.plan.trials)
            if wanted(speedup):
                yield ratio(speedup, rates, "speculating", "ours")
            if with_penalty:
                yield ratio(penalty, rates, "undrafted", "random", goal=Goal(1.03, at_least=False))


def adaptive(stand: Stand, wanted: Callable[[str], bool]) -> Iterator[Figure]:
    """The node's own choice over the best draft length of a sweep.

    The best length is the one with the best median over all trials, and the ratio is the median of the trials' ratios
    against that one: taking each trial's best would take its luck.
    """
    for batch in stand.plan.sweep_batches:
        name = f"adaptive_vs_best_fixed_b{batch}"
        if not wanted(name):
            continue
        arms = {"adaptive": stand.arm(stand.engine(), Mode(batch))}
        for length in stand.plan.lengths:
            engine = stand.engine(length=length or None)
            arms[str(length)] = stand.arm(engine, Mode(batch, speculate=length > 0))
        rates = interleaved(arms, stand.plan.trials)
        best = max(map(str, stand.plan.lengths), key=lambda length: rates[length].clock.median)
        detail = {"best": int(best), "tokens_per_s": {arm: rate.told for arm, rate in rates.items()}}
        yield ratio(name, rates, "adaptive", best, goal=Goal(0.95, at_least=True), detail=detail)
