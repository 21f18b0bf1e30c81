"""Several requests at a time: speculation by batch size, adaptive drafting, tracing, hot swaps, and latency."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ops.bench.embedded_kafka import running_broker, use_broker
from ops.bench.engines import DriveResult, EnginePool, RequestMode, drive
from ops.bench.harness import Figure, Goal, Selection, compare_arms, percentile, run_alternating
from ops.bench.serving.drafter_comparison import TEMPERATURES, ComparisonPlan
from ops.bench.serving.vllm_comparison import VllmMode, VllmPlan
from schemas.speculator import checkpoint
from serving.engines.builtin.engine import BuiltinEngine
from serving.traces.chunks import Origin
from serving.traces.publisher import TracePublisher


@dataclass(frozen=True, slots=True)
class ServingSize:
    """How much is measured."""

    trials: int
    tokens: int
    """Longest output."""
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    """Fixed numbers of draft tokens that adaptive drafting is compared with; 0 is no speculation."""
    sweep_batches: tuple[int, ...]
    swaps: int
    latency_requests: int
    drafters: ComparisonPlan
    vllm: VllmPlan


QUICK = ServingSize(
    trials=3,
    tokens=24,
    batches=(1, 8),
    lengths=(0, 3),
    sweep_batches=(1,),
    swaps=20,
    latency_requests=12,
    drafters=ComparisonPlan(
        trials=3,
        tokens=40,
        repetitive_tokens=80,
        prompts=1,
        batches=(1, 4),
        kinds=("greedy",),
        warm_up=12,
        day_0_tokens=32,
    ),
    # The exact type, and what was fastest of all on processors with bfloat16 instructions.
    vllm=VllmPlan(trials=3, modes=(VllmMode("float32"), VllmMode("bfloat16", compiled=True)), draft_tokens=3),
)
FULL = ServingSize(
    trials=5,
    tokens=64,
    batches=(1, 4, 8),
    lengths=(0, 1, 2, 3, 4, 5),
    sweep_batches=(1, 8),
    swaps=100,
    latency_requests=64,
    drafters=ComparisonPlan(
        trials=5,
        tokens=64,
        repetitive_tokens=160,
        prompts=2,
        batches=(1, 4, 8),
        kinds=("greedy", "sampled"),
        warm_up=40,
        day_0_tokens=64,
    ),
    vllm=VllmPlan(
        trials=5,
        # float16 takes six times as long as bfloat16 on processors without its instructions.
        modes=tuple(VllmMode(dtype, compiled) for dtype in ("float32", "bfloat16") for compiled in (False, True)),
        draft_tokens=3,
    ),
)

TRACES = "trace_overhead"
SWAPS = "swap_gap_p99_ms"
LATENCY = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")

_PENALTY_GOAL = Goal(1.03, at_least=False)
_TRACED_CONCURRENCY = 8
_SWAPPED_CONCURRENCY = 4
_LATENCY_CONCURRENCY = 8
_FLUSH_S = 10.0
_APART_S = 0.2
"""Between a swap and the moment that it is compared with."""
_ALLOWED_PAUSE_MS = 50.0


@dataclass(frozen=True, slots=True)
class SwapMoment:
    """Start and end of a swap, in monotonic seconds."""

    started: float
    ended: float


def figure_names(size: ServingSize) -> list[str]:
    """Return the names of these figures; greedy at batch 1 belongs to the single stream."""
    greedy_b1 = (1, "greedy")
    return [
        *(f"speculation_speedup_b{b}_{kind}" for b in size.batches for kind in TEMPERATURES if (b, kind) != greedy_b1),
        *(f"random_draft_penalty_b{b}" for b in size.batches if b != 1),
        *(f"adaptive_vs_best_fixed_b{b}" for b in size.sweep_batches),
        *(TRACES, SWAPS, *LATENCY),
    ]


def measure_speedups(pool: EnginePool, size: ServingSize, selected: Selection) -> Iterator[Figure]:
    """Compare the trained draft with no speculation, and no speculation with a random draft."""
    for batch in size.batches:
        for kind, temperature in TEMPERATURES.items():
            speedup, penalty = f"speculation_speedup_b{batch}_{kind}", f"random_draft_penalty_b{batch}"
            with_penalty = kind == "greedy" and selected(penalty)
            if (batch == 1 and kind == "greedy") or not (selected(speedup) or with_penalty):
                continue
            on, off = RequestMode(batch, temperature), RequestMode(batch, temperature, speculate=False)
            arms = {"ours": pool.arm(pool.engine(), off)}
            if selected(speedup):
                arms["speculating"] = pool.arm(pool.engine(), on)
            if with_penalty:
                # In one engine: two differ by where their weights lie in memory, by more than this penalty.
                arms["undrafted"] = pool.arm(pool.engine("random"), off)
                arms["random"] = pool.arm(pool.engine("random"), on)
            rates = run_alternating(arms, size.trials)
            if selected(speedup):
                yield compare_arms(speedup, rates, "speculating", "ours")
            if with_penalty:
                yield compare_arms(penalty, rates, "undrafted", "random", goal=_PENALTY_GOAL)


def measure_adaptive_drafting(pool: EnginePool, size: ServingSize, selected: Selection) -> Iterator[Figure]:
    """Compare adaptive drafting with the best fixed draft length of a sweep.

    The best length has the best median over all trials, and the ratio is the median of the trials' ratios to it: the
    best length of each single trial would include luck.
    """
    for batch in size.sweep_batches:
        name = f"adaptive_vs_best_fixed_b{batch}"
        if not selected(name):
            continue
        arms = {"adaptive": pool.arm(pool.engine(), RequestMode(batch))}
        for length in size.lengths:
            engine = pool.engine(length=length or None)
            arms[str(length)] = pool.arm(engine, RequestMode(batch, speculate=length > 0))
        rates = run_alternating(arms, size.trials)
        best = max(map(str, size.lengths), key=lambda length: rates[length].clock.median)
        detail = {"best": int(best), "tokens_per_s": {arm: rate.tokens_per_s for arm, rate in rates.items()}}
        yield compare_arms(name, rates, "adaptive", best, goal=Goal(0.95, at_least=True), detail=detail)


def measure_trace_overhead(pool: EnginePool, size: ServingSize, selected: Selection) -> Iterator[Figure]:
    """Compare no capture with every verify step published to a real broker, features inline."""
    if not selected(TRACES):
        return
    with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder, running_broker(Path(folder)) as broker:
        settings = use_broker(pool.settings, broker.bootstrap)
        publisher = TracePublisher(settings.kafka, settings.traces)
        engine = pool.start_engine("trained", sink=publisher)
        publisher.start(Origin("bench", engine.target, engine.line, engine.vocabulary))
        try:
            modes = {"on": RequestMode(_TRACED_CONCURRENCY, trace=True), "off": RequestMode(_TRACED_CONCURRENCY)}
            rates = run_alternating({name: pool.arm(engine, mode) for name, mode in modes.items()}, size.trials)
        finally:
            engine.stop()
            counts = publisher.close(_FLUSH_S)
    rows = {"captured": counts.captured, "published": counts.published, "dropped": counts.dropped}
    yield compare_arms(TRACES, rates, "off", "on", goal=Goal(1.02, at_least=False), detail={"rows": rows})


def measure_swap_gap(pool: EnginePool, size: ServingSize, selected: Selection) -> Iterator[Figure]:
    """Measure how much longer than usual a request waits for its next token because a version is swapped in.

    Versions are read, checked and swapped in as the version poller does it, while requests run. The same wait is
    measured at moments without a swap: a prompt that joins, or another program, delays requests as well.
    """
    if not selected(SWAPS):
        return
    engine = pool.engine()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("trained", "random")}
        checkpoint.write_checkpoint(pool.trained, folders["trained"], engine.target)
        checkpoint.write_checkpoint(pool.random, folders["random"], engine.target)
        with pool.under_load(engine, _SWAPPED_CONCURRENCY) as results:
            moments = [_swap(engine, *list(folders.items())[i % 2]) for i in range(size.swaps)]
    engine.swap(pool.trained, pool.name)
    usual, waits = waits_around(results[0], [swap for swap, _ in moments])
    _, undisturbed = waits_around(results[0], [moment for _, moment in moments])
    detail = {
        "swaps": len(waits),
        "failed_requests": results[0].failed,
        "requests": len(results[0].outputs),
        "usual_verify_step_ms": round(usual, 2),
        "gap_p50_ms": round(percentile(waits, 0.5), 2),
        "gap_max_ms": round(max(waits), 2),
        "gap_p50_without_swap_ms": round(percentile(undisturbed, 0.5), 2),
        "gap_p99_without_swap_ms": round(percentile(undisturbed, 0.99), 2),
    }
    goal = Goal(round(usual + _ALLOWED_PAUSE_MS, 1), at_least=False)
    yield Figure(SWAPS, percentile(waits, 0.99), "ms", goal, detail=detail)


def _swap(engine: BuiltinEngine, version: str, folder: Path) -> tuple[SwapMoment, SwapMoment]:
    """Swap a version in, then wait as long without a swap, to compare with."""
    draft = checkpoint.read_checkpoint(folder, engine.line)
    engine.check(draft)
    started = time.perf_counter()
    engine.swap(draft, version)
    ended = time.perf_counter()
    time.sleep(_APART_S)
    later = time.perf_counter()
    time.sleep(ended - started)
    return SwapMoment(started, ended), SwapMoment(later, time.perf_counter())


def waits_around(result: DriveResult, swaps: Sequence[SwapMoment]) -> tuple[float, list[float]]:
    """Return the usual time between two outputs, and the excess of the longest wait at each swap over it, in ms.

    A swap that no running request overlaps has no excess.
    """
    gaps = [gap for output in result.outputs for gap in output.gaps]
    usual = median(end - begin for begin, end in gaps)
    longest = [
        max((end - begin for begin, end in gaps if begin <= swap.ended and end >= swap.started), default=usual)
        for swap in swaps
    ]
    return usual * 1e3, [(wait - usual) * 1e3 for wait in longest]


def measure_latency(pool: EnginePool, size: ServingSize, selected: Selection) -> Iterator[Figure]:
    """Measure time to first token and inter-token latency at the engine, with a full batch."""
    if not any(map(selected, LATENCY)):
        return
    prompts = pool.trial_prompts(0, size.latency_requests)
    requests = [pool.request(prompt, RequestMode(), i) for i, prompt in enumerate(prompts)]
    result = drive(pool.engine(), requests, _LATENCY_CONCURRENCY)
    first = [output.time_to_first_token_s * 1e3 for output in result.outputs if output.times]
    between = [(end - begin) * 1e3 for output in result.outputs for begin, end in output.gaps]
    detail = {
        "requests": len(result.outputs),
        "failed_requests": result.failed,
        "at_once": _LATENCY_CONCURRENCY,
        "tokens_per_s": round(result.tokens_per_s, 2),
        "accepted_per_step": round(result.accepted_per_step, 3),
    }
    for name, values, share in zip(LATENCY, (first, first, between, between), (0.5, 0.99, 0.5, 0.99), strict=True):
        if selected(name):
            yield Figure(name, percentile(values, share), "ms", detail=detail)
