"""Dead letters with a real broker and worker: list, show, and replay after a fix."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pytest
from stream_worker import Publisher, chunk, claimed_chunks, rows_of_records, stream_settings, wait_until, worker
from typer.testing import CliRunner, Result

from ops.cli.main import app
from pipeline import topics
from pipeline.batches import build
from pipeline.broker import TopicError
from pipeline.dead_letters.queue import DeadLetterFilter, DeadLetterQueue
from pipeline.delta import DeltaLog
from schemas.batches import DEAD_LETTERS
from schemas.claim_store import ClaimStore
from schemas.settings import Settings, Traces, to_environ
from schemas.trace.record import Chunk, encode

CLAIMED = 3


@pytest.fixture
def settings(broker: str, tmp_path: Path, free_port: Callable[[], int]) -> Settings:
    made = stream_settings(broker, tmp_path, free_port())
    return made.model_copy(update={"traces": Traces(claim_check_uri=str(tmp_path / "claims"))})


def aurora(settings: Settings, *arguments: str) -> Result:
    result = CliRunner().invoke(app, ["dlq", *arguments], env=to_environ(settings))
    assert result.exit_code == 0, result.output
    return result


def listed(settings: Settings, *arguments: str) -> list[dict[str, Any]]:
    letters: list[dict[str, Any]] = json.loads(aurora(settings, "list", "--json", *arguments).stdout)
    return letters


def file_of(claimed: Chunk) -> Path:
    assert claimed.envelope.claim is not None
    return Path(urlsplit(claimed.envelope.claim.uri).path)


def test_a_repaired_dead_letter_is_replayed_into_the_tables_once(settings: Settings, tmp_path: Path) -> None:
    topics.create(settings.kafka)
    publisher, tables, log = Publisher(settings), DeltaLog(settings.tables), tmp_path / "worker.log"
    claimed = claimed_chunks(range(CLAIMED), ClaimStore(settings.traces))
    for made in claimed:
        file_of(made).rename(tmp_path / file_of(made).name)
        publisher.send(made, encode(made))
    publisher.send(chunk(9, np.random.default_rng(9)), b"not a chunk, but long enough")
    publisher.flush()

    def stored(records: int) -> None:
        assert wait_until(lambda: rows_of_records(tables) >= records, 40), log.read_text()[-5_000:]

    with worker(settings, log):
        stored(CLAIMED + 1)
        letters = listed(settings)
        assert Counter(one["reason"] for one in letters) == {"claim_missing": CLAIMED, "corrupt": 1}

        foreign = next(one for one in letters if one["reason"] == "corrupt")
        shown = aurora(settings, "show", foreign["id"], "--save", str(tmp_path / "saved"))
        assert "checksum fits" not in shown.stdout
        assert "6e6f 7420 6120 6368" in shown.stdout
        assert (tmp_path / "saved").read_bytes() == b"not a chunk, but long enough"

        aurora(settings, "replay", "--reason", "claim_missing")
        stored(2 * CLAIMED + 1)
        again = [one for one in listed(settings, "--reason", "claim_missing") if not one["replays"]]
        assert len(again) == CLAIMED, "each came back as a letter of its own"
        origin = json.loads(aurora(settings, "show", again[0]["id"], "--json").stdout)[0]["replay_of"]
        assert [one["replays"][0]["reason"] for one in listed(settings) if one["id"] == origin] == ["claim_missing"]

        for made in claimed:
            (tmp_path / file_of(made).name).rename(file_of(made))
        tried = json.loads(aurora(settings, "replay", "--all", "--dry-run", "--json").stdout)
        assert {one["letter"] for one in tried["replayed"]} == {one["id"] for one in again}
        assert sum(tried["excluded"].values()) == CLAIMED + 1
        aurora(settings, "replay", "--all")
        stored(3 * CLAIMED + 1)
        assert json.loads(aurora(settings, "replay", "--all", "--json").stdout)["replayed"] == []
        aurora(settings, "replay", again[0]["id"], "--again")
        stored(3 * CLAIMED + 2)

    rows = build(publisher.ledger.records, settings.stream.context_tokens, ClaimStore(settings.traces).get).rows
    for name in ("accepted", "rejected", "traces"):
        assert without_coordinates(tables.read(name)) == without_coordinates(rows[name]), name
    assert tables.read("dead_letters")["reason"].to_pylist().count("duplicate") == 1


def without_coordinates(rows: pa.Table) -> list[str]:
    """Return the sorted rows without the position of their record."""
    return sorted(map(repr, rows.drop_columns(["topic", "partition", "offset", "day"]).to_pylist()))


def test_a_dead_letter_that_the_broker_rejects_is_an_error_and_is_not_recorded(settings: Settings) -> None:
    small = settings.kafka.model_copy(update={"max_message_bytes": 10_000})
    topics.create(small)
    tables = DeltaLog(settings.tables)
    row = {"topic": "elsewhere", "partition": 0, "time": 0, "day": 0, "reason": "unreadable", "detail": ""}
    letters = [
        {**row, "offset": n, "size": size, "value": bytes(size), "headers": []}
        for n, size in enumerate([10, 40_000, 10])
    ]
    tables.append("dead_letters", pa.Table.from_pylist(letters, schema=DEAD_LETTERS))
    dead = DeadLetterQueue(tables, settings.kafka)
    with pytest.raises(TopicError, match=r"1 of 3 dead letters were not replayed: elsewhere/0/1: .*max\.message"):
        list(dead.replay(dead.find(DeadLetterFilter())))
    assert sorted(tables.read("replays")["offset"].to_pylist()) == [0, 2]
