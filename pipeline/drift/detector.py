"""When the traffic changes: whether a version is accepted more or less often than before. No I/O and no clock.

**What is observed.** A request once, by the chunk that holds its verify step 1. Verify steps of one request are
alike, and so are
its chunks, but ADWIN's bound is for independent observations. With every verify step as one, every sixth stationary
stream
of 5,000 raised a false alarm; with every chunk of long answers, three of four did; with one observation for each
request, none of 300. It needs no memory of requests, as a verify step says its number.

**Which figure.** ``acceptance``: the share of a request's verify steps with a draft in which the target took the
draft's
first choice for the next token. It lies between 0 and 1, which ADWIN wants, and it does not depend on how deep or how
wide a node chooses to draft; the accepted tokens per step does, so it is reported and not judged.

**Where it changed.** ADWIN says that a window does not have one mean, and drops old observations until it has: a coarse
answer to where. So the window is split where its halves differ most, by the means' difference over its deviation; those
are the figures before and after.

**What the state depends on.** Each partition is watched for itself, and its detectors see what lies between two fixed
offsets: generation g begins at offset ``g * window`` and ends at ``(g + 2) * window``. Two of them are there at a time,
and the elder one speaks, except of what the one before it has noticed while it spoke. So what is said at an offset
follows from at most ``3 * window`` records before it, whoever read them and however often it was started anew: the
state is rebuilt from the table, and says the same again, byte for byte. The price is that partitions do not add up
their evidence.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.offsets import Source
from schemas.events import AcceptanceStats, DriftEvent
from schemas.settings import Drift

COLUMNS = ("offset", "verify_step", "line", "label", "speculator", "time", "draft_tokens", "accepted")
"""Columns of ``traces`` that observations are made from."""
KEYS = 256
"""Versions and labels that a partition keeps apart; beyond it the one that was seen longest ago is forgotten."""
CLOCK = 8
"""Observations between two looks for a change."""
Floats = npt.NDArray[np.float64]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST_US = 253_370_764_800 * 10**6
"""The year 9999, where Python's time ends. A record may claim any."""


class Key(NamedTuple):
    """What is told apart."""

    line: str
    speculator: str
    label: str | None


@dataclass(frozen=True, slots=True)
class Observation:
    """What one request shows of the version that drafted in its first verify steps: means over its verify steps with
    a draft.
    """

    offset: int
    key: Key
    time_us: int
    """Of the last of these verify steps."""
    acceptance: float
    accepted_per_step: float
    drafted: float


@dataclass(frozen=True, slots=True)
class Change:
    """Where a series changed, and the figures on both sides."""

    before: AcceptanceStats
    after: AcceptanceStats
    since_offset: int
    since_us: int


def observations(verify_steps: pa.Table) -> Iterator[Observation]:
    """What verify steps of one partition show, in the order of their offsets. Chunks are whole; ``COLUMNS`` are
    used.
    """
    begun = pc.unique(verify_steps.filter(pc.equal(verify_steps["verify_step"], 1))["offset"])
    kept = pc.and_(pc.is_in(verify_steps["offset"], value_set=begun), pc.not_equal(verify_steps["speculator"], ""))
    verify_steps = verify_steps.filter(pc.and_(kept, pc.greater(pc.list_value_length(verify_steps["draft_tokens"]), 0)))
    if not verify_steps.num_rows:
        return
    accepted = verify_steps["accepted"].combine_chunks()
    lengths = pc.list_value_length(accepted)
    # Node 0 is the draft's first choice, also in a tree.
    first = np.zeros(len(accepted))
    first[lengths.to_numpy() > 0] = pc.equal(pc.list_element(accepted.filter(pc.greater(lengths, 0)), 0), 0)
    by = ["offset", "line", "speculator", "label"]
    figures = pa.table(
        {
            **{name: verify_steps[name] for name in by},
            "time": verify_steps["time"].cast(pa.int64()),
            "first": first,
            "kept": lengths,
            "drafted": pc.list_value_length(verify_steps["draft_tokens"]),
        }
    )
    grouped = figures.group_by(by, use_threads=False).aggregate(
        [("time", "max"), ("first", "mean"), ("kept", "mean"), ("drafted", "mean")]
    )
    # Groups come in no order.
    for row in grouped.sort_by([("offset", "ascending"), ("speculator", "ascending")]).to_pylist():
        key = Key(row["line"], row["speculator"], row["label"])
        yield Observation(row["offset"], key, row["time_max"], row["first_mean"], row["kept_mean"], row["drafted_mean"])


class PartitionWatch:
    """Watches one partition. Observations come in the order of their offsets."""

    def __init__(self, source: Source, settings: Drift) -> None:
        self._source = source
        self._settings = settings
        self._newest = 0
        self._elder, self._younger = _Generation(settings), _Generation(settings)
        self._noticed: dict[Key, int] = {}
        self._noticed_before: dict[Key, int] = {}

    def observe(self, seen: Observation) -> DriftEvent | None:
        """Take one observation; an event if it completes the evidence of a change."""
        self._advance(seen.offset // self._settings.window_records)
        self._younger.observe(seen)
        change = self._elder.observe(seen)
        if change is None:
            return None
        self._noticed[seen.key] = seen.offset
        if change.since_offset <= self._noticed_before.get(seen.key, -1):
            return None
        return _event(self._source, seen, change)

    def figures(self) -> Mapping[Key, AcceptanceStats]:
        """The means of every key since its last change."""
        return self._elder.figures()

    def _advance(self, newest: int) -> None:
        """Begin the generation with this number, and give the word to the one before it."""
        for g in range(max(self._newest + 1, newest - 2), newest + 1):
            self._newest = g
            self._elder, self._younger = self._younger, _Generation(self._settings)
            self._noticed_before, self._noticed = self._noticed, {}


def rebuilt_from(offset: int, window: int) -> int:
    """The first offset on which depends what is said from ``offset`` on."""
    return max(0, (offset // window - 2) * window)


class _Generation:
    """Every key's observations of a range of offsets."""

    def __init__(self, settings: Drift) -> None:
        self._settings = settings
        self._series: dict[Key, _Series] = {}

    def observe(self, seen: Observation) -> Change | None:
        series = self._series.pop(seen.key, None) or _Series(self._settings)
        self._series[seen.key] = series  # the one that was seen longest ago stands first
        if len(self._series) > KEYS:
            del self._series[next(iter(self._series))]
        return series.observe(seen)

    def figures(self) -> Mapping[Key, AcceptanceStats]:
        return {key: series.figures() for key, series in self._series.items()}


class _Series:
    """One key's observations since its last change, and the detector that looks at them."""

    _WIDTH = 5

    def __init__(self, settings: Drift) -> None:
        self._settings = settings
        self._changed = _detector(settings)
        # Offset, time and figures of each observation, end to end: a tenth of what objects would take.
        self._seen = array("d")
        self._sums = (0.0, 0.0, 0.0)

    def observe(self, seen: Observation) -> Change | None:
        self._seen.extend((seen.offset, seen.time_us, seen.acceptance, seen.accepted_per_step, seen.drafted))
        acceptance, accepted_per_step, drafted = self._sums
        self._sums = (acceptance + seen.acceptance, accepted_per_step + seen.accepted_per_step, drafted + seen.drafted)
        return self._begin_anew() if self._changed(seen.acceptance) else None

    def figures(self) -> AcceptanceStats:
        n = len(self._seen) // self._WIDTH
        acceptance, accepted_per_step, drafted = (total / n for total in self._sums)
        return AcceptanceStats(
            requests=n, first_token_acceptance=acceptance, acceptance_length=1 + accepted_per_step, draft_tokens=drafted
        )

    def _begin_anew(self) -> Change:
        """Forget what was before the change. The detector learns from nothing: one change is told once."""
        seen = np.array(self._seen).reshape(-1, self._WIDTH)
        split = split_of(seen[:, 2], self._settings.min_requests)
        before, after = seen[:split], seen[split:]
        self._seen = array("d", after.ravel())
        acceptance, accepted_per_step, drafted = map(float, after[:, 2:].sum(axis=0))
        self._sums = acceptance, accepted_per_step, drafted
        self._changed = _detector(self._settings)
        return Change(_means(before), _means(after), since_offset=int(after[0, 0]), since_us=int(after[0, 1]))


def split_of(figures: Floats, least: int) -> int:
    """How many of the figures lie before the point where the means on its two sides differ most, for their lengths.

    Args:
        figures: [n] in their order, n at least twice ``least``.
        least: Figures on each side.
    """
    n = len(figures)
    left = np.arange(least, n - least + 1)
    sums = np.cumsum(figures)
    difference = sums[left - 1] / left - (sums[-1] - sums[left - 1]) / (n - left)
    return int(left[np.argmax(np.abs(difference) * np.sqrt(left * (n - left)))])


def _detector(settings: Drift) -> Callable[[float], bool]:
    """ADWIN. Takes the next figure; tells whether the figures so far cannot have one mean."""
    # The class behind ``river.drift.ADWIN``. The module of that one imports scikit-learn, pandas and SQLAlchemy for its
    # other content: 80 to 130 MB and over a second for each worker. A test holds that both say the same.
    from river._river_rust.drift import AdaptiveWindowing

    least = settings.min_requests
    update: Callable[[float], bool] = AdaptiveWindowing(
        delta=settings.delta, clock=CLOCK, min_window_length=least, grace_period=2 * least
    ).update
    return update


def _means(seen: Floats) -> AcceptanceStats:
    acceptance, accepted_per_step, drafted = map(float, seen[:, 2:].mean(axis=0))
    return AcceptanceStats(
        requests=len(seen),
        first_token_acceptance=acceptance,
        acceptance_length=1 + accepted_per_step,
        draft_tokens=drafted,
    )


def _event(source: Source, seen: Observation, change: Change) -> DriftEvent:
    coordinates = json.dumps([*source, seen.offset, *seen.key])
    return DriftEvent(
        id=hashlib.blake2b(coordinates.encode(), digest_size=8).hexdigest(),
        time=_time(seen.time_us),
        **seen.key._asdict(),
        topic=source.topic,
        partition=source.partition,
        offset=seen.offset,
        direction="fall" if change.after.first_token_acceptance < change.before.first_token_acceptance else "rise",
        before=change.before,
        after=change.after,
        since=_time(change.since_us),
    )


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=min(max(microseconds, 0), _LATEST_US))
