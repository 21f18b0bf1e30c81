"""Tests of drift detection: false alarms, detection delay, and determinism."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import conversation, record_of, tables_of, verify_step_of

from pipeline.drift.detector import (
    MAX_KEYS,
    TRACE_COLUMNS,
    Observation,
    PartitionDetector,
    TrafficKey,
    find_replay_start,
    find_split,
    observe_requests,
)
from pipeline.offsets import SourcePartition
from schemas.batches import TRACES
from schemas.draft_tree import chain
from schemas.events import DriftEvent
from schemas.settings import Drift
from schemas.trace.record import ROOT, DraftSource

Floats = npt.NDArray[np.float64]

Traffic = Callable[[np.random.Generator, float, int], Floats]

SOURCE = SourcePartition("traces", 0)
KEY = TrafficKey("line", "7", "sql")
DEFAULTS = Drift()
SPREAD = 0.15
"""Standard deviation of the acceptance between requests, without the deviation between verify steps."""


def difficulty(rng: np.random.Generator, acceptance: float, requests: int) -> Floats:
    """Return the acceptance probability of each request."""
    k = acceptance * (1 - acceptance) / SPREAD**2 - 1
    return rng.beta(acceptance * k, (1 - acceptance) * k, requests)


def of_requests(rng: np.random.Generator, acceptance: float, requests: int) -> Floats:
    """Return the first-token acceptance of each request, over 4 to 40 verify steps."""
    verify_steps = rng.integers(4, 41, requests)
    return rng.binomial(verify_steps, difficulty(rng, acceptance, requests)) / verify_steps


def in_sessions(rng: np.random.Generator, acceptance: float, requests: int) -> Floats:
    """Return the acceptance of requests of sixteen concurrent users, about eight each, half of them correlated."""
    user, begins = rng.integers(16, size=requests), rng.random(requests) < 1 / 8
    session = np.empty(requests, np.int64)
    for one in range(16):
        session[user == one] = one * requests + np.cumsum(begins[user == one])
    _, session = np.unique(session, return_inverse=True)
    of_session, own = (difficulty(rng, acceptance, requests) for _ in range(2))
    worth = np.where(rng.random(requests) < 1 / 2, of_session[session], own)
    verify_steps = rng.integers(4, 41, requests)
    return rng.binomial(verify_steps, worth) / verify_steps


def seen(acceptances: Iterable[float], keys: Sequence[TrafficKey] = (KEY,)) -> Iterator[Observation]:
    """Yield observations of the keys in turn, one per record and second."""
    for offset, acceptance in enumerate(acceptances):
        key = keys[offset % len(keys)]
        yield Observation(offset, key, offset * 10**6, float(acceptance), 3 * float(acceptance), 4.0)


def events(observed: Iterable[Observation], tuning: Drift = DEFAULTS) -> list[DriftEvent]:
    watch = PartitionDetector(SOURCE, tuning)
    return [event for one in observed if (event := watch.observe(one))]


@pytest.mark.parametrize("traffic", [of_requests, in_sessions])
def test_at_most_one_of_fifty_stationary_streams_raises_a_false_alarm(traffic: Traffic) -> None:
    # Each stream covers several generations.
    tuning = Drift(window_records=1_500)
    alarms = [len(events(seen(traffic(np.random.default_rng(seed), 0.6, 5_000)), tuning)) for seed in range(50)]
    assert sum(map(bool, alarms)) <= 1


@pytest.mark.parametrize(("to", "within"), [(0.3, 120), (0.4, 180), (0.5, 500), (0.7, 500), (0.8, 180)])
def test_shift_is_reported_once_and_soon_with_both_means(to: float, within: int) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        shift = int(rng.integers(1_000, 3_000))
        acceptances = np.concatenate([of_requests(rng, 0.6, shift), of_requests(rng, to, 3_000)])
        [event] = events(seen(acceptances))
        assert shift < event.offset <= shift + within
        assert event.direction == ("fall" if to < 0.6 else "rise")
        assert event.before.first_token_acceptance == pytest.approx(0.6, abs=0.03)
        assert event.after.first_token_acceptance == pytest.approx(to, abs=0.06)
        assert event.before.acceptance_length == pytest.approx(1 + 3 * event.before.first_token_acceptance)
        assert event.before.requests + event.after.requests == event.offset + 1
        assert abs(event.since.timestamp() - shift) < 150
        assert event.time == datetime.fromtimestamp(event.offset, UTC)


@pytest.mark.parametrize("seed", range(30))
def test_shift_near_the_end_of_a_generation_is_reported_once(seed: int) -> None:
    # The younger generation has few observations before the shift. It detects the shift later than the older one.
    rng, tuning = np.random.default_rng(seed), Drift(window_records=1_000)
    shift = 2_000 + int(rng.integers(50, 500))
    observed = list(seen(np.concatenate([of_requests(rng, 0.6, shift), of_requests(rng, 0.5, 3_000)])))
    [event] = events(observed, tuning)
    # A worker that starts between the two detections knows that the shift was reported.
    again = events(observed[find_replay_start(3_000, tuning.window_records) :], tuning)
    assert [one for one in again if one.offset >= 3_000] == [one for one in [event] if one.offset >= 3_000]


def test_labels_and_versions_are_observed_separately() -> None:
    rng = np.random.default_rng(0)
    sql, chat = KEY, KEY._replace(label=None)
    values = np.stack([of_requests(rng, 0.7, 3_000), of_requests(rng, 0.4, 3_000)], axis=1)
    values[1_500:, 1] = of_requests(rng, 0.7, 1_500)
    [event] = events(seen(values.ravel(), [sql, chat]))
    assert (event.label, event.direction, event.before.first_token_acceptance) == (
        None,
        "rise",
        pytest.approx(0.4, abs=0.03),
    )

    # The next version is better from its first request on. Neither version has changed.
    before = list(seen(of_requests(rng, 0.4, 2_000)))
    after = [
        Observation(2_000 + one.offset, KEY._replace(speculator="8"), one.time_us, one.first_token_acceptance, 1, 1)
        for one in seen(of_requests(rng, 0.7, 2_000))
    ]
    assert not events([*before, *after])


@dataclass(frozen=True)
class Drafting:
    """Requests whose draft tokens are accepted at random, in order."""

    acceptance: float
    depth: int

    def rows(self, rng: np.random.Generator, offsets: range, verify_steps: int = 8) -> pa.Table:
        n = len(offsets) * verify_steps
        worth = np.repeat(difficulty(rng, self.acceptance, len(offsets)), verify_steps)
        kept = np.minimum(rng.geometric(1 - worth) - 1, self.depth)
        columns = {
            "offset": np.repeat(np.array(offsets), verify_steps),
            "verify_step": np.tile(np.arange(1, verify_steps + 1), len(offsets)),
            "line": ["line"] * n,
            "label": [None] * n,
            "speculator": ["7"] * n,
            "time": np.repeat(np.array(offsets) * 10**6, verify_steps),
            "draft_parents": [chain(self.depth)] * n,
            "draft_sources": [None] * n,
            "accepted": [list(range(k)) for k in kept],
        }
        fields = [TRACES.field(name) for name in TRACE_COLUMNS]
        return pa.table([pa.array(columns[f.name], f.type) for f in fields], pa.schema(fields))


def test_shallower_drafts_raise_no_alarm_although_the_acceptance_length_falls() -> None:
    rng = np.random.default_rng(0)
    deep, shallow = Drafting(0.6, 6).rows(rng, range(1_500)), Drafting(0.6, 1).rows(rng, range(1_500, 3_000))
    observed = [*observe_requests(deep), *observe_requests(shallow)]
    assert np.mean([one.accepted_per_step for one in observed[:1_500]]) > 1.3
    assert np.mean([one.accepted_per_step for one in observed[1_500:]]) < 0.65
    assert not events(observed)

    worse = Drafting(0.4, 6).rows(rng, range(3_000, 3_300))
    [event] = events([*observed, *observe_requests(worse)])
    assert event.direction == "fall"


def test_request_is_observed_once_by_its_verify_steps_with_a_draft() -> None:
    whole = conversation([1, 2, 3, *range(4, 14)], 3)
    assert [len(r.draft_tokens) for r in whole] == [0, 2, 2, 2, 2]
    right = verify_step_of(5, 11, [12, 13, 14], 15, [13, 14])
    wrong = verify_step_of(6, 14, [15], 16, [99, 98])
    nothing = verify_step_of(7, 15, [16], 17)
    records = [
        record_of("a", [*whole, right, wrong, nothing], 4),
        record_of("b", whole[:1], 5),
        record_of("a", [verify_step_of(8, 16, [17, 18], 19, [18])], 6, chunk=1),
    ]
    [one] = observe_requests(tables_of(*records)["traces"])
    assert (one.offset, one.key, one.time_us) == (4, TrafficKey("target-draft", "1", None), 1_700_000_000_000_000)
    assert one.first_token_acceptance == pytest.approx(5 / 6)
    assert one.accepted_per_step == pytest.approx((4 * 1 + 2 + 0) / 6)
    assert one.draft_tokens == 2


def traces(**columns: Sequence[object]) -> pa.Table:
    """Return rows with the given columns; the others are those of a verify step that accepted its only draft token."""
    n = len(next(iter(columns.values())))
    usual = {
        "offset": [0] * n,
        "verify_step": list(range(1, n + 1)),
        "line": ["line"] * n,
        "label": [None] * n,
        "speculator": ["7"] * n,
        "time": [0] * n,
        "draft_parents": [[ROOT]] * n,
        "draft_sources": [None] * n,
        "accepted": [[0]] * n,
    }
    fields = [TRACES.field(name) for name in TRACE_COLUMNS]
    return pa.table([pa.array({**usual, **columns}[f.name], f.type) for f in fields], pa.schema(fields))


def test_first_token_acceptance_of_a_tree_does_not_depend_on_its_width() -> None:
    [one] = observe_requests(traces(draft_parents=[[ROOT, ROOT, 0]] * 3, accepted=[[0, 2], [1], []]))
    assert (one.first_token_acceptance, one.accepted_per_step, one.draft_tokens) == (pytest.approx(1 / 3), 1, 3)


def test_each_version_in_a_chunk_is_observed_by_its_own_verify_steps() -> None:
    first, second = observe_requests(traces(speculator=["7", "7", "8", ""], accepted=[[0], [], [], [0]]))
    assert (first.key.speculator, first.first_token_acceptance) == ("7", 0.5)
    assert (second.key.speculator, second.first_token_acceptance) == ("8", 0)


def test_observations_are_ordered_by_offset_for_any_order_of_rows_and_commits() -> None:
    rng = np.random.default_rng(0)
    rows = Drafting(0.6, 3).rows(rng, range(700))
    whole = list(observe_requests(rows))
    assert [one.offset for one in whole] == list(range(700))
    assert list(observe_requests(rows.take(rng.permutation(rows.num_rows)))) == whole
    parts = [Drafting(0.6, 3).rows(np.random.default_rng(n), range(40 * n, 40 * n + 40)) for n in range(5)]
    assert [one for part in parts for one in observe_requests(part)] == list(observe_requests(pa.concat_tables(parts)))


def test_verify_steps_without_a_draft_give_no_observation() -> None:
    assert not list(observe_requests(TRACES.empty_table()))
    assert not list(observe_requests(traces(draft_parents=[[], []], accepted=[[], []])))


def test_tokens_of_the_suffix_drafter_are_no_observation_of_a_version() -> None:
    suffix, both = int(DraftSource.SUFFIX), int(DraftSource.SUFFIX | DraftSource.SPECULATOR)
    alone = traces(speculator=[""] * 2, draft_sources=[[suffix]] * 2)
    assert not list(observe_requests(alone))
    mixed = traces(
        speculator=["7"] * 3,
        verify_step=[3, 4, 5],
        draft_parents=[[ROOT, 0, 1], [ROOT, ROOT], [ROOT, 0]],
        draft_sources=[[both, both, suffix], [suffix, both], [suffix, both]],
        accepted=[[0, 1, 2], [0], [0, 1]],
    )
    [one] = observe_requests(pa.concat_tables([alone, mixed]))
    assert (one.key.speculator, one.first_token_acceptance) == ("7", 1 / 2), "of the two steps with an own draft"
    assert (one.accepted_per_step, one.draft_tokens) == (1, 1.5)


def test_event_has_a_valid_time_for_any_record_time() -> None:
    absurd = [
        Observation(one.offset, KEY, time_us, one.first_token_acceptance, 1, 1)
        for one, time_us in zip(seen([1.0] * 200 + [0.0] * 200), [2**63 - 1] * 200 + [-(2**63)] * 200, strict=True)
    ]
    [event] = events(absurd)
    assert event.since.year == 1970


def test_key_observed_longest_ago_is_evicted() -> None:
    watch = PartitionDetector(SOURCE, Drift())
    labels = [KEY._replace(label=str(i)) for i in range(MAX_KEYS + 10)]
    for offset, label in enumerate(labels):
        watch.observe(Observation(2 * offset, label, 0, 0.5, 1, 1))
        watch.observe(Observation(2 * offset + 1, KEY, 0, 0.5, 1, 1))
    means = watch.means()
    assert len(means) == MAX_KEYS
    assert means[KEY].requests == MAX_KEYS + 10
    assert labels[0] not in means
    assert labels[-1] in means


@pytest.mark.parametrize(("silent", "requests"), [(0, 600), (400, 600), (500, 100), (9_000, 100)])
def test_means_cover_at_most_two_windows(silent: int, requests: int) -> None:
    watch = PartitionDetector(SOURCE, Drift(window_records=500))
    for one in seen([0.5] * 1_100):
        watch.observe(replace(one, offset=one.offset if one.offset < 1_000 else one.offset + silent))
    assert watch.means()[KEY].requests == requests


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), at=st.integers(0, 6_000), window=st.integers(100, 1_500))
def test_restart_does_not_change_the_events(seed: int, at: int, window: int) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.uniform(0.2, 0.8, 8)
    values = np.concatenate([of_requests(rng, level, 750) for level in levels])
    # Some records have no observation.
    keys = [KEY, KEY._replace(label="chat")]
    observed = [one for one in seen(values, keys) if rng.random() < 0.9]
    tuning = Drift(window_records=window, min_requests=10)

    uninterrupted, rebuilt = PartitionDetector(SOURCE, tuning), PartitionDetector(SOURCE, tuning)
    start = find_replay_start(at, window)
    assert at - start <= 3 * window
    said = [event for one in observed if (event := uninterrupted.observe(one)) and one.offset >= at]
    again = [event for one in observed if one.offset >= start and (event := rebuilt.observe(one)) and one.offset >= at]
    assert [event.model_dump_json() for event in again] == [event.model_dump_json() for event in said]
    assert rebuilt.means() == uninterrupted.means() or at > observed[-1].offset


def test_restarts_of_the_property_test_fall_between_events() -> None:
    """Otherwise the property would hold for a detector that reports nothing."""
    rng = np.random.default_rng(0)
    values = np.concatenate([of_requests(rng, level, 750) for level in (0.2, 0.7, 0.3, 0.8)])
    assert len({event.id for event in events(seen(values), Drift(window_records=700, min_requests=10))}) == 3


@given(st.lists(st.integers(0, 40), min_size=10, max_size=60), st.integers(1, 5))
def test_split_is_where_the_means_differ_most(counts: list[int], least: int) -> None:
    figures = np.array(counts) / 40

    def difference(left: int) -> float:
        right = len(figures) - left
        return abs(figures[:left].mean() - figures[left:].mean()) * (left * right) ** 0.5

    split = find_split(figures, least)
    assert least <= split <= len(figures) - least
    best = max(difference(left) for left in range(least, len(figures) - least + 1))
    assert difference(split) == pytest.approx(best)


def test_detector_equals_the_public_class_of_the_library() -> None:
    from river.drift import ADWIN

    from pipeline.drift.detector import CHECK_INTERVAL, _create_adwin

    tuning = Drift()
    least = tuning.min_requests
    theirs = ADWIN(delta=tuning.delta, clock=CHECK_INTERVAL, min_window_length=least, grace_period=2 * least)
    ours = _create_adwin(tuning)
    rng = np.random.default_rng(0)
    for value in np.concatenate([of_requests(rng, 0.6, 1_000), of_requests(rng, 0.4, 1_000)]):
        theirs.update(value)
        assert ours(value) == theirs.drift_detected
        if theirs.drift_detected:
            return
    pytest.fail("neither saw the change")
