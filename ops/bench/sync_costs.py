"""What a takeover costs a running engine: versions are read, checked and swapped in while requests are answered."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ops.bench.drive import drive
from ops.bench.stand import Mode, Stand
from ops.bench.sync_policies import Costs
from schemas.errors import UserError
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.versions.update_policy import Reading

AT_ONCE = 4
_APART_S = 1.5
"""Between two takeovers: so long the usual output is measured."""


class Stretch(NamedTuple):
    """What was output in a time."""

    tokens: int
    seconds: float


class Takeover(NamedTuple):
    """The pause of a swap, the output just before the takeover, and while the version was read and checked."""

    pause_s: float
    before: Stretch
    during: Stretch


def measured(stand: Stand, draft: EagleDraft, takeovers: int) -> Costs:
    """Over so many takeovers of a draft, under load: the median pause, and what fetching takes on average.

    Raises:
        UserError: requests failed.
    """
    engine, ending = stand.start("random", length=4), threading.Event()
    try:
        with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder, ThreadPoolExecutor(1) as pool:
            version = Path(folder) / "version"
            checkpoint.write(draft, version, engine.target)
            stand.warm(engine, Mode(AT_ONCE))
            load = pool.submit(drive, engine, _endless(stand, ending), AT_ONCE)
            try:
                found = [_take_over(engine, version) for _ in range(takeovers)]
            finally:
                ending.set()
                run = load.result()
    finally:
        engine.stop()
    if run.failed:
        raise UserError(f"{run.failed} of {len(run.answers)} requests failed: {engine.health().error}")
    verify_steps = sum(answer.stats.verify_steps for answer in run.answers if answer.stats)
    return Costs(run.seconds / verify_steps, median(one.pause_s for one in found), fetch_cost(found))


def fetch_cost(found: Sequence[Takeover]) -> float:
    """Serving time, in seconds, that reading and checking a version takes from the verify steps.

    The output of a moment is a few verify steps more or less: all moments are added up before they are compared.
    """
    before, during = _added([one.before for one in found]), _added([one.during for one in found])
    share = 1 - (during.tokens / during.seconds) / (max(before.tokens, 1) / before.seconds)
    return max(share, 0.0) * during.seconds / len(found)


def _take_over(engine: BuiltinEngine, version: Path) -> Takeover:
    before = _reading(engine)
    time.sleep(_APART_S)
    begun = _reading(engine)
    draft = checkpoint.read(version, engine.line)
    engine.check(draft)
    brought = _reading(engine)
    return Takeover(engine.swap(draft, "bench").pause_ms / 1e3, _stretch(before, begun), _stretch(begun, brought))


def _added(stretches: Sequence[Stretch]) -> Stretch:
    return Stretch(sum(one.tokens for one in stretches), sum(one.seconds for one in stretches))


def _stretch(first: Reading, last: Reading) -> Stretch:
    return Stretch(last.output_tokens - first.output_tokens, last.time_s - first.time_s)


def _reading(engine: BuiltinEngine) -> Reading:
    health = engine.health()
    return Reading(time.perf_counter(), health.verify_steps, health.accepted_tokens, health.output_tokens)


def _endless(stand: Stand, ending: threading.Event) -> Iterator[Request]:
    for number in count():
        if ending.is_set():
            return
        yield stand.request(stand.prompts[number % len(stand.prompts)], Mode(), number)
