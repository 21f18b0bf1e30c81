"""``aurora bench serving``: the figures of the serving node, from one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ops.bench import batched, loaded, machine
from ops.bench.paired import Figure
from ops.bench.single import NAMES, SingleStream
from ops.bench.stand import FULL, QUICK, Plan, Say, Stand
from schemas.errors import UserError
from schemas.settings import Settings
from trainer.candidates import code_revision

Wanted = Callable[[str], bool]


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


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run and the machine that they are of."""

    machine: dict[str, Any]
    plan: Plan
    speculator: str
    domain: str
    code: str
    seconds: float
    figures: tuple[Figure, ...]

    @property
    def title(self) -> str:
        """For the table."""
        return f"serving on {self.machine['processor']}, {self.machine['threads']} thread(s)"

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "machine": self.machine,
            "plan": asdict(self.plan),
            "speculator": self.speculator,
            "domain": self.domain,
            "code": self.code,
            "seconds": round(self.seconds, 1),
            "figures": {figure.name: figure.summary() for figure in self.figures},
        }


def run(settings: Settings, options: Options, say: Say) -> Report:
    """Measure.

    Raises:
        UserError: no such figure, no such speculator, no target.
    """
    started, plan = time.monotonic(), options.plan
    wanted = _wanted(options.only, plan)
    described = machine.describe(settings.serve.threads)
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
    return Report(
        machine=described,
        plan=plan,
        speculator=options.speculator,
        domain=options.domain,
        code=code_revision(),
        seconds=time.monotonic() - started,
        figures=tuple(figures),
    )


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


def _wanted(only: tuple[str, ...], plan: Plan) -> Wanted:
    known = names(plan)
    for prefix in only:
        if not any(name.startswith(prefix) for name in known):
            raise UserError(f"--only {prefix}: no such figure; there are {', '.join(known)}")
    return lambda name: not only or name.startswith(only)


def _line(figure: Figure) -> str:
    if figure.value is None:
        return f"{figure.name}: not measured, {(figure.detail or {}).get('why')}"
    verdict = {True: ", met", False: ", missed", None: ""}[figure.met]
    goal = f" (goal {figure.goal}{verdict})" if figure.goal else ""
    return f"{figure.name}: {figure.value:.3f} {figure.unit}".rstrip() + goal
