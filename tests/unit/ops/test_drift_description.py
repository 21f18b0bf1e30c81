"""Description of a drift event, with labels escaped."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from rich.console import Console

from ops.observe.status import Overview, build_status_table, describe_drift
from schemas.events import AcceptanceStats, DriftEvent
from schemas.status import DriftStatus, StreamStatus

BEFORE = AcceptanceStats(requests=1_204, first_token_acceptance=0.61, acceptance_length=3.1, draft_tokens=4.0)
AFTER = AcceptanceStats(requests=180, first_token_acceptance=0.42, acceptance_length=2.3, draft_tokens=3.9)


@pytest.fixture(autouse=True)
def _in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def event(**changes: object) -> DriftEvent:
    whole = {
        "id": "0",
        "time": datetime(2026, 11, 23, 13, 9, tzinfo=UTC),
        "line": "line",
        "speculator": "7",
        "label": "sql",
        "topic": "traces",
        "partition": 0,
        "offset": 5,
        "direction": "fall",
        "before": BEFORE,
        "after": AFTER,
        "since": datetime(2026, 11, 23, 13, 2, tzinfo=UTC),
    }
    return DriftEvent.model_validate(whole | changes)


def test_an_event_is_described_with_its_figures_in_local_time() -> None:
    assert describe_drift(event()) == (
        "version 7 on label sql is accepted less often since 14:02: its first token 42% instead of 61%, "
        "acceptance length 2.30 instead of 3.10 (180 requests since, 1,204 before)"
    )


def test_a_rise_without_a_label_that_started_the_day_before() -> None:
    risen = event(
        direction="rise", label=None, before=AFTER, after=BEFORE, since=datetime(2026, 11, 22, 13, 2, tzinfo=UTC)
    )
    assert describe_drift(risen).startswith(
        "version 7 is accepted more often since 2026-11-22 14:02: its first token 61% instead"
    )


def test_a_changed_number_of_draft_tokens_is_mentioned() -> None:
    assert describe_drift(event(after=AFTER.model_copy(update={"draft_tokens": 2.0}))).endswith(
        "; 2.0 draft tokens per step, 4.0 before"
    )


@pytest.mark.parametrize("label", ["\x1b[2Jsql", "a\nb", "\u202esql"])
def test_control_characters_in_labels_are_escaped(label: str) -> None:
    assert describe_drift(event(label=label)).isprintable()


def test_the_status_table_ends_with_the_newest_event() -> None:
    drift = DriftStatus(detected=2, dropped=0, failed=0, newest=[event(), event(label="[red]sql")], traffic=[])
    nothing = {"partitions": [], "dead_letters": {}, "not_live": [], "not_ready": [], "error": None}
    stream = StreamStatus.model_construct(**(dict.fromkeys(StreamStatus.model_fields, 0) | nothing | {"drift": drift}))
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(build_status_table(Overview.model_construct(stream=stream)))
    last = console.export_text().splitlines()[-1]
    assert last.startswith("drift")
    assert "version 7 on label [red]sql is accepted less often" in last
