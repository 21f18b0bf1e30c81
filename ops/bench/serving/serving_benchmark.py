"""``aurora bench serving``: all figures of the serving node, from one run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from ops.bench.engines import EnginePool
from ops.bench.harness import Figure, Report, Say, Selection, Session, select_figures
from ops.bench.serving import concurrent_requests, drafter_comparison, single_stream, vllm_comparison
from ops.bench.serving.concurrent_requests import FULL, QUICK, ServingSize
from schemas.settings import Settings


def run(
    settings: Settings, say: Say, *, quick: bool, only: tuple[str, ...], trained_speculator: str, domain: str
) -> Report:
    """Measure the figures whose names begin with one of ``only``, or all."""
    size = QUICK if quick else FULL
    selected = select_figures(only, figure_names(size))
    session = Session(settings.serve.num_threads)
    pool = EnginePool(settings, trained_speculator, domain, size.tokens, say)
    figures = []
    try:
        for figure in _measure(pool, size, selected):
            say(str(figure))
            figures.append(figure)
    finally:
        pool.stop()
    session.machine["kernel"] = pool.kernel
    about = {"plan": asdict(size), "speculator": trained_speculator, "domain": domain, "seconds": session.seconds}
    title = f"serving on {session.machine['processor']}, {session.machine['threads']} thread(s)"
    return session.report(title, about, figures)


def figure_names(size: ServingSize) -> list[str]:
    """Return the names of all figures of a size."""
    return [
        *single_stream.FIGURE_NAMES,
        *vllm_comparison.FIGURE_NAMES,
        *concurrent_requests.figure_names(size),
        *drafter_comparison.figure_names(size.drafters),
    ]


def _measure(pool: EnginePool, size: ServingSize, selected: Selection) -> Iterator[Figure]:
    if any(map(selected, single_stream.FIGURE_NAMES)):
        yield from single_stream.SingleStream(pool, size.trials, selected).measure()
    yield from vllm_comparison.VllmComparison(pool, size.vllm, selected).measure()
    yield from concurrent_requests.measure_speedups(pool, size, selected)
    yield from concurrent_requests.measure_trace_overhead(pool, size, selected)
    yield from concurrent_requests.measure_swap_gap(pool, size, selected)
    yield from concurrent_requests.measure_latency(pool, size, selected)
    yield from concurrent_requests.measure_adaptive_drafting(pool, size, selected)
    yield from drafter_comparison.DrafterComparison(pool, size.drafters, selected).measure()
