"""``aurora bench serving``: the figures of the serving node, from one run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ops.bench import batched, loaded, machine
from ops.bench.outcome import Report, Wanted, chosen
from ops.bench.paired import Figure
from ops.bench.single import NAMES, SingleStream
from ops.bench.stand import FULL, QUICK, Plan, Say, Stand
from schemas.settings import Settings
from trainer.release.registration import code_revision


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    quick: bool
    only: tuple[str, ...]
    """Names of figures, or how they begin; none for all."""
    speculator: str
    domain: str

    @property
    def plan(self) -> Plan:
        """How much is measured."""
        return QUICK if self.quick else FULL


def run(settings: Settings, options: Options, say: Say) -> Report:
    """Measure.

    Raises:
        UserError: no such figure, no such speculator, no target.
    """
    started, plan = time.monotonic(), options.plan
    wanted = chosen(options.only, names(plan))
    described = machine.describe(settings.serve.num_threads)
    stand = Stand(settings, plan, options.speculator, options.domain, say)
    figures = []
    try:
        for figure in _measure(stand, wanted):
            say(_line(figure))
            figures.append(figure)
    finally:
        stand.stop()
    described["kernel"] = stand.weights
    described["load_average_after"] = machine.load_average()
    about = {
        "plan": asdict(plan),
        "speculator": options.speculator,
        "domain": options.domain,
        "seconds": round(time.monotonic() - started, 1),
    }
    title = f"serving on {described['processor']}, {described['threads']} thread(s)"
    return Report(title, described, code_revision(), about, tuple(figures))


def names(plan: Plan) -> list[str]:
    """All figures that a plan measures."""
    return [*NAMES, *batched.names(plan.batches, plan.sweep_batches), loaded.TRACES, loaded.SWAPS, *loaded.LATENCY]


def _measure(stand: Stand, wanted: Wanted) -> Iterator[Figure]:
    if any(map(wanted, NAMES)):
        yield from SingleStream(stand, wanted).figures()
    yield from batched.speedups(stand, wanted)
    yield from loaded.trace_overhead(stand, wanted)
    yield from loaded.swap_gap(stand, wanted)
    yield from loaded.latency(stand, wanted)
    yield from batched.adaptive(stand, wanted)


def _line(figure: Figure) -> str:
    if figure.value is None:
        return f"{figure.name}: not measured, {(figure.detail or {}).get('why')}"
    verdict = {True: ", met", False: ", missed", None: ""}[figure.met]
    goal = f" (goal {figure.goal}{verdict})" if figure.goal else ""
    return f"{figure.name}: {figure.value:.3f} {figure.unit}".rstrip() + goal
