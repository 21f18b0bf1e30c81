"""States of a loop for its page: one with everything in it, and one of which nothing can be read."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel

from ops.observe.status import Overview
from ops.web.loop_reader import LoopState, Reading, RegisteredLine, Sample
from pipeline.dead_letters.queue import DeadLetter, RecordAddress
from schemas.events import QUARANTINED_TAG, AcceptanceStats, DriftEvent
from schemas.status import (
    ComparedStatus,
    ComparisonStatus,
    DriftStatus,
    PartitionStatus,
    PromoterStatus,
    ServeStatus,
    StreamStatus,
    SwapStatus,
    TrafficStatus,
    TrainStatus,
)
from trainer.release.registry import Line, Version

NOW = datetime(2026, 11, 30, 20, 0, tzinfo=UTC)
LINE = "smollm2-135m-instruct-3f9c2a71-eagle3-8k"
HOSTILE = "<script>alert(1)</script>"


def blank(model: type[BaseModel], **known: Any) -> Any:
    """Return a status with zeros for all other fields."""
    zeros: dict[Any, Any] = {int: 0, float: 0.0, bool: True, str: "-"}
    values = {
        name: zeros.get(field.annotation, [] if "list" in str(field.annotation) else None)
        for name, field in model.model_fields.items()
        if field.is_required()
    }
    return model.model_validate(values | known)


def version(number: int, hours: float, gain: float, **tags: str) -> Version:
    figures = {
        "accepted_per_step": 0.9 + gain,
        "champion": str(number - 1),
        "champion_accepted_per_step": 0.9,
        "gain_low": gain - 0.04,
        "gain_high": gain + 0.04,
    }
    own = {"parent": str(number - 1), "held_out": json.dumps(figures)} if number > 1 else {}
    return Version(str(number), NOW - timedelta(hours=hours), own | tags, "", "")


def move(minutes: float, alias: str, before: str | None, after: str | None, actor: str, why: str) -> dict[str, Any]:
    return {
        "time": NOW - timedelta(minutes=minutes),
        "line": LINE,
        "alias": alias,
        "from_version": before,
        "to_version": after,
        "actor": actor,
        "why": why,
    }


def full_state() -> LoopState:
    """Return a loop with traffic, a canary, a quarantine, drift and dead letters."""
    end = NOW.timestamp()
    swaps = [SwapStatus(version=str(v), time=end - 60 * at, in_flight=3, pause_ms=9.0) for v, at in ((5, 38), (6, 14))]
    node = blank(
        ServeStatus,
        node="node-0",
        speculator="6",
        role="champion",
        draining=False,
        draft_depth=4,
        speedup=1.43,
        saved_s=5_400.0,
        acceptance_length=2.31,
        requests_running=4,
        requests_finished=18_204,
        rows_published=412_004,
        swaps=swaps,
        registry_error=None,
    )
    stats = [
        AcceptanceStats(requests=n, first_token_acceptance=p, acceptance_length=a, draft_tokens=3.9)
        for n, p, a in ((812, 0.71, 2.4), (340, 0.52, 1.8))
    ]
    drift = DriftEvent(
        id="drift-1",
        time=NOW - timedelta(minutes=9),
        line=LINE,
        speculator="6",
        label="sql",
        topic="aurora.traces.v1",
        partition=0,
        offset=9120,
        direction="fall",
        before=stats[0],
        after=stats[1],
        since=NOW - timedelta(minutes=16),
    )
    traffic = [
        TrafficStatus(line=LINE, speculator="6", label=label, acceptance=stat)
        for label, stat in zip((None, "sql"), stats, strict=True)
    ]
    stream = blank(
        StreamStatus,
        partitions=[
            PartitionStatus(partition=p, next_offset=9_000 + p, end_offset=9_002 + p, lag=2, stalled_s=0)
            for p in range(2)
        ],
        rows_written=411_870,
        last_commit_time=end - 1.4,
        dead_letters={"corrupt": 2, "duplicate": 1},
        drift=DriftStatus(detected=1, dropped=0, failed=0, newest=[drift], traffic=traffic),
        maintenance_files={},
        error=None,
    )
    train = blank(
        TrainStatus,
        step=12_480,
        loss=1.213,
        acceptance_length=2.36,
        newest_sample_age_s=22.0,
        table_version_latest=801,
        table_version_read=799,
        error=None,
    )
    figures = [
        ComparedStatus(
            figure=name,
            label=label,
            new=1.0,
            before=1.0,
            difference=difference,
            low=difference - 0.05,
            high=difference + 0.05,
        )
        for name, label, difference in (
            ("tokens per second", None, 0.034),
            ("acceptance length", None, 0.051),
            ("tokens per second", "sql", -0.012),
        )
    ]
    canary = ComparisonStatus(
        kind="canary",
        version="7",
        baseline="6",
        start_time=end - 1_200,
        end_time=end + 80_000,
        requests=1_204,
        baseline_requests=10_022,
        figures=figures,
    )
    promoter = blank(
        PromoterStatus,
        champion="6",
        candidate="7",
        previous="5",
        canary="7",
        alias_moves=14,
        verdict="canary 7 of champion 6: neither worse nor shown to be as good yet",
        comparisons=[canary],
        error=None,
    )
    samples = tuple(
        Sample(
            end - 3_000 + 5 * i,
            90 + 40 * min(i / 300, 1) + 9 * math.sin(i / 7),
            84 + 6 * math.sin(i / 9),
            1.6 + 0.7 * min(i / 300, 1) + 0.08 * math.sin(i / 5),
        )
        for i in range(600)
    )
    versions = (
        version(1, 30.0, 0.0),
        version(2, 22.0, 0.11),
        version(3, 12.0, 0.09, **{QUARANTINED_TAG: "rolled back: worse on label sql"}),
        version(4, 6.0, 0.16),
        version(5, 2.1, 0.08),
        version(6, 0.4, 0.12),
        version(7, 0.1, 0.07),
    )
    aliases = {"champion": "6", "canary": "7", "candidate": "7", "previous": "5"}
    moves = [
        move(40, "champion", "4", "5", "promoter", "gain +0.080 over version 4 (0.040 to 0.120)"),
        move(14, "champion", "5", "6", "promoter", "gain +0.120 over version 5 (0.080 to 0.160)"),
        move(6, "candidate", "6", "7", "trainer", "registered"),
        move(5, "canary", None, "7", "web page", f"look at it first {HOSTILE}"),
    ]
    letters = [
        DeadLetter(
            RecordAddress("aurora.traces.v1", 1, 20_394 + i), NOW - timedelta(minutes=i), reason, "", None, 12, ()
        )
        for i, reason in enumerate(("corrupt", "corrupt", "duplicate"))
    ]
    overview = Overview(serve=node, stream=stream, train=train, promoter=promoter)
    return LoopState(
        overview,
        samples,
        Reading((RegisteredLine(Line(LINE, aliases), versions),), end),
        Reading(moves, end),
        Reading(letters, end),
    )


def silent_state() -> LoopState:
    """Return a loop in which nothing answers, and of which the moves were read before."""
    silent = {
        name: f"no status from 127.0.0.1:{port} ({name}.port): [Errno 111] Connection refused"
        for name, port in (("serve", 8000), ("stream", 16066), ("train", 16067), ("promoter", 16068))
    }
    moves = [move(40, "champion", "4", "5", "promoter", "gain")]
    return LoopState(
        Overview(silent=silent),
        lines=Reading(error="registry.tracking_uri http://127.0.0.1:15000: no answer"),
        moves=Reading(moves, NOW.timestamp() - 300, "table promotions: tables.uri does not answer"),
        dead_letters=Reading(error="table dead_letters: tables.uri does not answer"),
    )
