"""Live figures sum the verify steps of versions by node, slice and label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from live_traffic import ServedRequest, rows_of

from pipeline.delta import DeltaLog, HistoryExpiredError
from schemas.settings import Canary, Tables
from schemas.trace.record import DraftSource
from trainer.release.live_figures import MAX_COMMITS_BEHIND, LiveFigures, ServingPeriod
from trainer.release.sequential_test import ServedTraffic

LINE = "target-draft"
WITHOUT_BURN_IN = Canary(slice_duration=10, burn_in=0)
T = 1_700_000_000.0
SUFFIX = (int(DraftSource.SUFFIX),) * 3


@pytest.fixture
def tables(tmp_path: Path) -> DeltaLog:
    return DeltaLog(Tables(uri=str(tmp_path)))


def totals(served: ServedTraffic) -> tuple[int, float, float, float]:
    return (
        int(served.requests.sum()),
        served.tokens.sum(),
        served.verify_steps.sum(),
        round(float(served.seconds.sum()), 6),
    )


def read_both(
    live: LiveFigures, since: float = T, until: float = math.inf
) -> tuple[dict[str, ServedTraffic], dict[str, ServedTraffic]]:
    return live.read_traffic(LINE, [ServingPeriod("2", since, until)], [ServingPeriod("1", since, until)])


def test_verify_steps_are_added_up_by_version_label_and_slice(tables: DeltaLog) -> None:
    requests = [
        ServedRequest("1", T, label="sql"),
        ServedRequest("1", T + 10, label="sql"),
        ServedRequest("2", T + 20, accepted=2, label="sql"),
        ServedRequest("2", T + 20, accepted=2),
        ServedRequest("9", T + 30),
        ServedRequest("2", T + 20, line="another"),
    ]
    tables.append("traces", rows_of(requests))
    new, old = read_both(LiveFigures(tables, WITHOUT_BURN_IN))
    assert list(new) == list(old) == ["sql", ""]
    assert totals(old["sql"]) == (2, 40, 20, 0.2)
    assert len(old["sql"].group) == 2
    assert totals(new["sql"]) == totals(new[""]) == (1, 30, 10, 0.1)
    assert new["sql"].group.tolist() == new[""].group.tolist()
    assert totals(old[""]) == (0, 0, 0, 0)


def test_a_request_that_began_under_another_version_counts_only_for_that_one(tables: DeltaLog) -> None:
    tables.append("traces", rows_of([ServedRequest("1", T, swapped_to="2")]))
    new, old = read_both(LiveFigures(tables, WITHOUT_BURN_IN))
    assert totals(old[""]) == (1, 10, 5, 0.05)
    assert totals(new[""]) == (0, 0, 0, 0)


def test_a_request_counts_only_in_the_slice_in_which_it_began(tables: DeltaLog) -> None:
    across = ServedRequest("1", T + 9, verify_steps=20, verify_step_s=0.1)
    began_before = ServedRequest("1", T + 21, start=T + 19.5)
    unknown = ServedRequest("1", T + 31, start=math.nan)
    tables.append("traces", rows_of([across, began_before, unknown, ServedRequest("2", T)]))
    new, old = read_both(LiveFigures(tables, WITHOUT_BURN_IN))
    assert totals(old[""]) == (1, 20, 10, 1.0)
    assert totals(new[""]) == (1, 20, 10, 0.1)


def test_requests_that_begin_in_the_burn_in_of_a_slice_or_of_a_swap_count_for_no_version(tables: DeltaLog) -> None:
    by_slice = [ServedRequest("1", T + at, label="slice") for at in (0, 2.9, 3, 9)]
    by_swap = [ServedRequest("2", T + 10 + at, active_since=T + 14, label="swap") for at in (4, 6.9, 7, 9)]
    earlier = [ServedRequest("1", T + 10 + at, label="swap") for at in (2, 3.5)]
    tables.append("traces", rows_of([*by_slice, *by_swap, *earlier]))
    new, old = read_both(LiveFigures(tables, Canary(slice_duration=10, burn_in=3)))
    assert (totals(old["slice"])[0], totals(old["swap"])[0], totals(new["swap"])[0]) == (2, 1, 2)


def test_rows_of_older_nodes_count_for_no_version(tables: DeltaLog) -> None:
    rows = rows_of([ServedRequest("1", T), ServedRequest("2", T)])
    nulls = pa.nulls(rows.num_rows, rows.schema.field("active_since").type)
    for column in ("start_time", "active_since"):
        older = rows.set_column(rows.schema.get_field_index(column), rows.schema.field(column), nulls)
        tables.append("traces", older)
    assert read_both(LiveFigures(tables, WITHOUT_BURN_IN)) == ({}, {})


def test_verify_steps_without_a_draft_count_for_the_version_that_they_name(tables: DeltaLog) -> None:
    idle = [ServedRequest("2", T + 1, drafted=False), ServedRequest("", T + 1, drafted=False)]
    drafted = [ServedRequest("1", T), ServedRequest("1", T + 1), ServedRequest("2", T + 10)]
    tables.append("traces", rows_of([*idle, *drafted]))
    new, old = read_both(LiveFigures(tables, WITHOUT_BURN_IN))
    assert totals(new[""]) == (2, 30, 20, 0.2)
    assert totals(old[""]) == (2, 40, 20, 0.2)


def test_verify_steps_of_the_suffix_drafter_count_for_no_version(tables: DeltaLog) -> None:
    versions = [ServedRequest("1", T), ServedRequest("2", T + 10)]
    on_their_node = [ServedRequest("", T + at, accepted=3, sources=SUFFIX) for at in (0, 10)]
    elsewhere = [ServedRequest("", T, node="b", sources=SUFFIX), ServedRequest("", T + 1, node="b", drafted=False)]
    tables.append("traces", rows_of([*versions, *on_their_node, *elsewhere]))
    new, old = read_both(LiveFigures(tables, WITHOUT_BURN_IN))
    assert totals(new[""]) == totals(old[""]) == (1, 20, 10, 0.1)


def test_accepted_tokens_count_as_far_as_the_version_proposed_them(tables: DeltaLog) -> None:
    mixed = ServedRequest("1", T, accepted=3, sources=(3, 1, 2))
    after_suffix = ServedRequest("1", T + 10, accepted=3, sources=(2, 3, 1))
    tables.append("traces", rows_of([mixed, after_suffix, ServedRequest("2", T + 20, accepted=2)]))
    new, old = read_both(LiveFigures(tables, WITHOUT_BURN_IN))
    assert totals(old[""]) == totals(new[""]) == (1, 30, 10, 0.1)


def test_only_whole_slices_of_a_period_count(tables: DeltaLog) -> None:
    tables.append("traces", rows_of(ServedRequest(v, T + at) for v in "12" for at in (0, 10, 20)))
    new, old = read_both(LiveFigures(tables, WITHOUT_BURN_IN), since=T + 5, until=T + 25)
    assert len(new[""].group) == len(old[""].group) == 1


def test_versions_of_one_side_are_taken_together_each_since_its_own_time(tables: DeltaLog) -> None:
    tables.append("traces", rows_of(ServedRequest(v, T + at) for v in "123" for at in (0, 10, 20)))
    promoted = [ServingPeriod("2", T), ServingPeriod("3", T + 15)]
    new, old = LiveFigures(tables, WITHOUT_BURN_IN).read_traffic(LINE, promoted, [ServingPeriod("1", T)])
    assert totals(new[""]) == (4, 80, 40, 0.4)
    assert new[""].requests.tolist() == [1, 1, 2]
    assert totals(old[""]) == (3, 60, 30, 0.3)


def test_nodes_that_served_one_version_are_ignored_if_others_served_both(tables: DeltaLog) -> None:
    apart = [ServedRequest("1", T, node="a"), ServedRequest("2", T, node="b", accepted=2)]
    tables.append("traces", rows_of(apart))
    live = LiveFigures(tables, WITHOUT_BURN_IN)
    new, old = read_both(live)
    assert (totals(new[""])[0], totals(old[""])[0]) == (1, 1)
    tables.append("traces", rows_of([ServedRequest("1", T + 10, node="c"), ServedRequest("2", T + 20, node="c")]))
    new, old = read_both(live)
    assert (totals(new[""])[1], totals(old[""])[1]) == (20, 20)


def test_later_rows_are_added_and_a_restart_gives_the_same_sums(
    tables: DeltaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveFigures(tables, WITHOUT_BURN_IN)
    queries: list[str] = []
    query = tables.query
    monkeypatch.setattr(tables, "query", lambda sql, at: queries.append(sql) or query(sql, at))
    for at in range(0, 40, 10):
        tables.append("traces", rows_of([ServedRequest("1", T + at), ServedRequest("2", T + at, accepted=2)]))
        new, old = read_both(live)
    assert len(queries) == 1
    for mine, again in zip((new, old), read_both(LiveFigures(tables, WITHOUT_BURN_IN)), strict=True):
        assert totals(mine[""]) == totals(again[""])
        assert mine[""].group.tolist() == again[""].group.tolist()
    assert totals(new[""]) == (4, 120, 40, 0.4)


def test_rows_whose_commits_are_gone_are_queried(tables: DeltaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveFigures(tables, WITHOUT_BURN_IN)
    tables.append("traces", rows_of([ServedRequest("1", T)]))
    read_both(live)
    tables.append("traces", rows_of([ServedRequest("1", T)]))

    def gone(name: str, after: int, up_to: int, columns: Sequence[str]) -> pa.Table:
        raise HistoryExpiredError(f"{name} {after} {up_to} {columns}")

    monkeypatch.setattr(tables, "read_added", gone)
    _, old = read_both(live)
    assert totals(old[""])[0] == 2
    assert MAX_COMMITS_BEHIND > 1


def test_an_earlier_period_is_queried_again_and_a_later_one_excludes_it(tables: DeltaLog) -> None:
    tables.append("traces", rows_of([ServedRequest("1", T), ServedRequest("1", T + 100)]))
    live = LiveFigures(tables, WITHOUT_BURN_IN)
    assert totals(read_both(live, since=T + 50)[1][""])[0] == 1
    assert totals(read_both(live)[1][""])[0] == 2
    assert totals(read_both(live, since=T + 50)[1][""])[0] == 1


def test_without_traffic_there_are_no_labels(tables: DeltaLog) -> None:
    assert read_both(LiveFigures(tables, WITHOUT_BURN_IN)) == ({}, {})
