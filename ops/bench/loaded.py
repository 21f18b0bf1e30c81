"""The node under load: what capturing traces costs, how long a swap holds answers up, and how long tokens take."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

from ops.bench import embedded
from ops.bench.drive import Run, drive
from ops.bench.paired import Figure, Goal, interleaved, percentile, ratio
from ops.bench.stand import Mode, Stand
from schemas.speculator import checkpoint
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.traces.chunks import Origin
from serving.traces.publisher import TracePublisher

_TRACED_AT_ONCE = 8
_SWAPPED_AT_ONCE = 4
_LATENCY_AT_ONCE = 8
_FLUSH_S = 10.0
_APART_S = 0.2
"""Between a swap and the moment that it is compared with."""
_ALLOWED_PAUSE_MS = 50.0

TRACES = "trace_overhead"
SWAPS = "swap_gap_p99_ms"
LATENCY = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")


@dataclass(frozen=True, slots=True)
class Swap:
    """When a swap was asked for and when it was done; monotonic seconds."""

    asked: float
    done: float


def trace_overhead(stand: Stand, wanted: Callable[[str], bool]) -> Iterator[Figure]:
    """Tokens a second without capture over those with every verify step published, features inline, to a real
    broker.
    """
    if not wanted(TRACES):
        return
    with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder, embedded.broker(Path(folder)) as broker:
        settings = embedded.pointed_at(stand.settings, broker.bootstrap)
        publisher = TracePublisher(settings.kafka, settings.traces)
        engine = stand.start("trained", sink=publisher)
        publisher.start(Origin("bench", engine.target, engine.line, engine.vocabulary))
        try:
            on, off = (Mode(_TRACED_AT_ONCE, trace=trace) for trace in (True, False))
            rates = interleaved({"on": stand.arm(engine, on), "off": stand.arm(engine, off)}, stand.plan.trials)
        finally:
            engine.stop()
            counts = publisher.close(_FLUSH_S)
    detail = {"rows": {"captured": counts.captured, "published": counts.published, "shed": counts.shed}}
    yield ratio(TRACES, rates, "off", "on", goal=Goal(1.02, at_least=False), detail=detail)


def swap_gap(stand: Stand, wanted: Callable[[str], bool]) -> Iterator[Figure]:
    """How much longer than usual an answer waits for its next token because a version is swapped in.

    Versions are read, checked and swapped in as the puller does it, while requests run. The same is measured at moments
    without a swap: a prompt that joins, or another program, makes answers wait as well.
    """
    if not wanted(SWAPS):
        return
    engine, ending = stand.engine(), threading.Event()
    stand.warm(engine, Mode(_SWAPPED_AT_ONCE))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as pool:
        folders = {name: Path(scratch) / name for name in ("trained", "random")}
        checkpoint.write(stand.trained, folders["trained"], engine.target)
        checkpoint.write(stand.random, folders["random"], engine.target)
        load = pool.submit(drive, engine, _endless(stand, ending), _SWAPPED_AT_ONCE)
        try:
            moments = [_swap(engine, *list(folders.items())[i % 2]) for i in range(stand.plan.swaps)]
        finally:
            ending.set()
            run = load.result()
    engine.swap(stand.trained, stand.name)
    usual, waits = waits_around(run, [swap for swap, _ in moments])
    _, undisturbed = waits_around(run, [nothing for _, nothing in moments])
    detail = {
        "swaps": len(waits),
        "failed_requests": run.failed,
        "requests": len(run.answers),
        "usual_verify_step_ms": round(usual, 2),
        "gap_p50_ms": round(percentile(waits, 0.5), 2),
        "gap_max_ms": round(max(waits), 2),
        "gap_p50_without_swap_ms": round(percentile(undisturbed, 0.5), 2),
        "gap_p99_without_swap_ms": round(percentile(undisturbed, 0.99), 2),
    }
    goal = Goal(round(usual + _ALLOWED_PAUSE_MS, 1), at_least=False)
    yield Figure(SWAPS, percentile(waits, 0.99), "ms", goal, detail=detail)


def waits_around(run: Run, swaps: Sequence[Swap]) -> tuple[float, list[float]]:
    """The usual time between two outputs, and by how much the longest wait at each swap went beyond it; in ms.

    A swap that met no running answer held nothing up.
    """
    gaps = [gap for answer in run.answers for gap in answer.gaps]
    usual = median(end - begin for begin, end in gaps)
    longest = [
        max((end - begin for begin, end in gaps if begin <= swap.done and end >= swap.asked), default=usual)
        for swap in swaps
    ]
    return usual * 1e3, [(wait - usual) * 1e3 for wait in longest]


def latency(stand: Stand, wanted: Callable[[str], bool]) -> Iterator[Figure]:
    """Time to the first token and time between two outputs, with as many requests at a time as a batch holds."""
    if not any(map(wanted, LATENCY)):
        return
    prompts = stand.of_trial(0, stand.plan.latency_requests)
    run = drive(stand.engine(), [stand.request(p, Mode(), i) for i, p in enumerate(prompts)], _LATENCY_AT_ONCE)
    first = [answer.first_s * 1e3 for answer in run.answers if answer.times]
    between = [(end - begin) * 1e3 for answer in run.answers for begin, end in answer.gaps]
    detail = {
        "requests": len(run.answers),
        "failed_requests": run.failed,
        "at_once": _LATENCY_AT_ONCE,
        "tokens_per_s": round(run.rate, 2),
        "accepted_per_step": round(run.accepted_per_step, 3),
    }
    for name, values, share in zip(LATENCY, (first, first, between, between), (0.5, 0.99, 0.5, 0.99), strict=True):
        if wanted(name):
            yield Figure(name, percentile(values, share), "ms", detail=detail)


def _swap(engine: BuiltinEngine, version: str, folder: Path) -> tuple[Swap, Swap]:
    """Swap a version in, then let as much time go by without one, to compare with."""
    draft = checkpoint.read(folder, engine.line)
    engine.check(draft)
    asked = time.perf_counter()
    engine.swap(draft, version)
    done = time.perf_counter()
    time.sleep(_APART_S)
    later = time.perf_counter()
    time.sleep(done - asked)
    return Swap(asked, done), Swap(later, time.perf_counter())


def _endless(stand: Stand, ending: threading.Event) -> Iterator[Request]:
    for number in count():
        if ending.is_set():
            return
        yield stand.request(stand.prompts[number % len(stand.prompts)], Mode(), number)
