"""Drift detection: whether a speculator version is accepted more or less often than before. No I/O and no clock.

**Observation.** A request is observed once, by the chunk with its verify step 1. The verify steps of a request are
alike, and so are its chunks, but ADWIN's bound assumes independent observations. With one observation per verify step,
every sixth stationary stream of 5,000 raised a false alarm; with one per chunk of long answers, three of four did; with
one per request, none of 300 did. This needs no memory of requests, because a verify step has a number.

**Figure.** ``first_token_acceptance`` is the ratio of a request's verify steps with a draft in which the target
accepted the first draft token. It lies between 0 and 1, as ADWIN requires, and it does not depend on the depth or width
of the draft. The acceptance length does, so it is reported but not tested. Only the own draft of the version counts
(``schemas.trace.own_draft``).

**Position of the change.** ADWIN detects that a window does not have one mean, and drops old observations until it has,
which locates the change coarsely. So the window is split where its halves differ most, by the difference of the means
over its deviation. The two halves are reported as ``before`` and ``after``.

**Determinism.** Each partition has its own detectors, and each detector covers a fixed range of offsets: generation g
covers offsets from ``g * window`` to ``(g + 2) * window``. Two generations exist at a time. The older one reports,
except a change that the generation before it reported. So a report at an offset depends on at most ``3 * window``
records before it, in any worker and after any restart: the state is rebuilt from the table and reports the same events,
byte for byte. The price is that partitions do not combine their evidence.
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

from pipeline.offsets import SourcePartition
from schemas.events import AcceptanceStats, DriftEvent
from schemas.settings import Drift
from schemas.trace import own_draft
from schemas.trace.own_draft import find_own_drafts

TRACE_COLUMNS = ("offset", "verify_step", "line", "label", "time", *own_draft.COLUMNS)
"""Columns of ``traces`` that observations are computed from."""
MAX_KEYS = 256
"""Traffic keys per partition. Beyond it the key that was observed longest ago is evicted."""
CHECK_INTERVAL = 8
"""Observations between two checks for a change."""
Floats = npt.NDArray[np.float64]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST_US = 253_370_764_800 * 10**6
"""The year 9999, the last one of ``datetime``. A record may have any time."""


class TrafficKey(NamedTuple):
    """Traffic that is observed separately."""

    line: str
    speculator: str
    label: str | None


@dataclass(frozen=True, slots=True)
class Observation:
    """Acceptance of one request by the version that drafted first: means over its verify steps with an own draft."""

    offset: int
    key: TrafficKey
    time_us: int
    """Time of the last of these verify steps."""
    first_token_acceptance: float
    accepted_per_step: float
    draft_tokens: float


@dataclass(frozen=True, slots=True)
class AcceptanceChange:
    """A change of acceptance, and the means on both sides of it."""

    before: AcceptanceStats
    after: AcceptanceStats
    since_offset: int
    since_us: int


def observe_requests(verify_steps: pa.Table) -> Iterator[Observation]:
    """Yield the observations in verify steps of one partition, ordered by offset.

    Args:
        verify_steps: ``TRACE_COLUMNS`` of whole chunks.
    """
    first_chunks = pc.unique(verify_steps.filter(pc.equal(verify_steps["verify_step"], 1))["offset"])
    verify_steps = verify_steps.filter(pc.is_in(verify_steps["offset"], value_set=first_chunks))
    own = find_own_drafts(verify_steps)
    by = ["offset", "line", "speculator", "label"]
    figures = pa.table(
        {
            **{name: verify_steps[name] for name in by},
            "time": verify_steps["time"].cast(pa.int64()),
            "first": own.first_accepted.astype(np.float64),
            "accepted": own.accepted_tokens,
            "drafted": own.draft_tokens,
        }
    )
    figures = figures.filter(pc.greater(figures["drafted"], 0))
    grouped = figures.group_by(by, use_threads=False).aggregate(
        [("time", "max"), ("first", "mean"), ("accepted", "mean"), ("drafted", "mean")]
    )
    # Groups have no order.
    for row in grouped.sort_by([("offset", "ascending"), ("speculator", "ascending")]).to_pylist():
        key = TrafficKey(row["line"], row["speculator"], row["label"])
        yield Observation(
            row["offset"], key, row["time_max"], row["first_mean"], row["accepted_mean"], row["drafted_mean"]
        )


class PartitionDetector:
    """Detects drift in one partition. Observations are passed in the order of their offsets."""

    def __init__(self, source: SourcePartition, settings: Drift) -> None:
        self._source = source
        self._settings = settings
        self._generation = 0
        self._older, self._younger = _Generation(settings), _Generation(settings)
        self._reported: dict[TrafficKey, int] = {}
        """Offset of the last change of each key that the older generation detected."""
        self._reported_before: dict[TrafficKey, int] = {}
        """The same of the generation before it."""

    def observe(self, observation: Observation) -> DriftEvent | None:
        """Add an observation. Return an event if it completes the evidence of a change."""
        self._advance(observation.offset // self._settings.window_records)
        self._younger.observe(observation)
        change = self._older.observe(observation)
        if change is None:
            return None
        self._reported[observation.key] = observation.offset
        if change.since_offset <= self._reported_before.get(observation.key, -1):
            return None
        return _build_event(self._source, observation, change)

    def means(self) -> Mapping[TrafficKey, AcceptanceStats]:
        """Return the means of every key since its last change."""
        return self._older.means()

    def _advance(self, newest: int) -> None:
        """Start the generation ``newest``. The one before it reports from now on."""
        for generation in range(max(self._generation + 1, newest - 2), newest + 1):
            self._generation = generation
            self._older, self._younger = self._younger, _Generation(self._settings)
            self._reported_before, self._reported = self._reported, {}


def find_replay_start(offset: int, window: int) -> int:
    """Return the first offset that reports from ``offset`` on depend on."""
    return max(0, (offset // window - 2) * window)


class _Generation:
    """Observations of every key in a range of offsets."""

    def __init__(self, settings: Drift) -> None:
        self._settings = settings
        self._series: dict[TrafficKey, _Series] = {}

    def observe(self, observation: Observation) -> AcceptanceChange | None:
        series = self._series.pop(observation.key, None) or _Series(self._settings)
        self._series[observation.key] = series  # the key that was observed longest ago is the first
        if len(self._series) > MAX_KEYS:
            del self._series[next(iter(self._series))]
        return series.observe(observation)

    def means(self) -> Mapping[TrafficKey, AcceptanceStats]:
        return {key: series.mean() for key, series in self._series.items()}


class _Series:
    """Observations of one key since its last change, and their change detector."""

    def __init__(self, settings: Drift) -> None:
        self._settings = settings
        self._is_changed = _create_adwin(settings)
        # Offset, time and figures of each observation, end to end: a tenth of the memory of objects.
        self._observations = array("d")

    def observe(self, one: Observation) -> AcceptanceChange | None:
        figures = (one.first_token_acceptance, one.accepted_per_step, one.draft_tokens)
        self._observations.extend((one.offset, one.time_us, *figures))
        return self._split() if self._is_changed(one.first_token_acceptance) else None

    def mean(self) -> AcceptanceStats:
        return _mean(self._as_rows())

    def _split(self) -> AcceptanceChange:
        """Drop the observations before the change. A new detector starts empty, so that one change is reported once."""
        rows = self._as_rows()
        split = find_split(rows[:, 2], self._settings.min_requests)
        before, after = rows[:split], rows[split:]
        self._observations = array("d", after.ravel())
        self._is_changed = _create_adwin(self._settings)
        return AcceptanceChange(_mean(before), _mean(after), since_offset=int(after[0, 0]), since_us=int(after[0, 1]))

    def _as_rows(self) -> Floats:
        """Return [n, 5] the observations."""
        return np.array(self._observations).reshape(-1, 5)


def find_split(figures: Floats, least: int) -> int:
    """Return the number of figures before the point where the means of the two sides differ most, for their lengths.

    Args:
        figures: [n] figures in order, n at least twice ``least``.
        least: Least number of figures on each side.
    """
    n = len(figures)
    left = np.arange(least, n - least + 1)
    sums = np.cumsum(figures)
    difference = sums[left - 1] / left - (sums[-1] - sums[left - 1]) / (n - left)
    return int(left[np.argmax(np.abs(difference) * np.sqrt(left * (n - left)))])


def _create_adwin(settings: Drift) -> Callable[[float], bool]:
    """Return an ADWIN detector: a function that adds a figure and returns whether the figures cannot have one mean."""
    # The class behind ``river.drift.ADWIN``. That module imports scikit-learn, pandas and SQLAlchemy for its other
    # classes: 80 to 130 MB and over a second for each worker. A test checks that both give the same results.
    from river._river_rust.drift import AdaptiveWindowing

    least = settings.min_requests
    update: Callable[[float], bool] = AdaptiveWindowing(
        delta=settings.delta, clock=CHECK_INTERVAL, min_window_length=least, grace_period=2 * least
    ).update
    return update


def _mean(rows: Floats) -> AcceptanceStats:
    first_token_acceptance, accepted_per_step, draft_tokens = rows[:, 2:].mean(axis=0).tolist()
    return AcceptanceStats(
        requests=len(rows),
        first_token_acceptance=first_token_acceptance,
        acceptance_length=1 + accepted_per_step,
        draft_tokens=draft_tokens,
    )


def _build_event(source: SourcePartition, observation: Observation, change: AcceptanceChange) -> DriftEvent:
    coordinates = json.dumps([*source, observation.offset, *observation.key])
    return DriftEvent(
        id=hashlib.blake2b(coordinates.encode(), digest_size=8).hexdigest(),
        time=_to_datetime(observation.time_us),
        **observation.key._asdict(),
        topic=source.topic,
        partition=source.partition,
        offset=observation.offset,
        direction="fall" if change.after.first_token_acceptance < change.before.first_token_acceptance else "rise",
        before=change.before,
        after=change.after,
        since=_to_datetime(change.since_us),
    )


def _to_datetime(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=min(max(microseconds, 0), _LATEST_US))
