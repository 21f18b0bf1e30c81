"""Inline, claim-check and recomputed features of a real engine give the trainer the same samples."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_target import VOCABULARY, write_tiny_target
from trace_bench import FakeProducer

from pipeline.batches import Record, build
from pipeline.delta import DeltaLog
from schemas.claim_store import ClaimStore
from schemas.settings import Settings, load
from schemas.trace.record import VerifyStep
from serving.engines.base import Finish, Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.traces.chunks import FRAME_BYTES, Origin, drop_features, row_bytes
from serving.traces.publisher import TracePublisher
from trainer.data.data_loader import DataLoader
from trainer.data.samples import Sample
from trainer.data.target import FrozenTarget

REQUEST = Request("r", tuple(range(3, 40)), 60)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[tuple[VerifyStep, ...], Finish | None]] = []

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        self.calls.append((verify_steps, finish))


class Served:
    """One request of a real engine."""

    def __init__(self, folder: Path) -> None:
        self.settings = load(
            environ={},
            flags={
                "target.path": str(write_tiny_target(folder)),
                "speculator.draft_vocab_size": VOCABULARY,
                "serve.max_model_len": 128,
                "train.held_out_ratio": 1e-9,
                "train.batch_size": 1,
                "train.replay_batch_size": 0,
                "train.max_epochs": 1,
            },
        )
        recorder, done = Recorder(), threading.Event()
        engine = BuiltinEngine(self.settings, recorder)
        engine.start()
        engine.submit(REQUEST, lambda output: done.set() if output.finish else None)
        assert done.wait(60)
        engine.stop()
        self.origin = Origin("node-0", engine.target, engine.line, engine.vocabulary)
        self.layers = engine._target.shape.capture_layers
        self.calls = recorder.calls
        verify_steps = [r for of_call, _ in self.calls for r in of_call]
        self.whole, self.bare = (sum(map(row_bytes, of)) for of in (verify_steps, map(drop_features, verify_steps)))
        self.limit_messages((self.whole + self.bare) // 2)

    def limit_messages(self, rows: int) -> None:
        """Limit the bytes of rows in a message."""
        kafka = self.settings.kafka.model_copy(update={"max_message_bytes": rows + FRAME_BYTES})
        self.settings = self.settings.model_copy(update={"kafka": kafka})

    def records(self, folder: Path, way: str) -> tuple[Settings, list[Record]]:
        """Return the records that a node with ``traces.features = way`` sends."""
        flags = {"features": way, "claim_check_uri": str(folder / "claims")}
        settings = self.settings.model_copy(update={"traces": self.settings.traces.model_copy(update=flags)})
        producer = FakeProducer()
        publisher = TracePublisher(settings.kafka, settings.traces, lambda *_: producer)
        publisher.start(self.origin)
        for verify_steps, finish in self.calls:
            publisher.record(REQUEST, verify_steps, finish)
        counts = publisher.close(10)
        assert (counts.captured, counts.dropped) == (counts.published, {})
        sent = zip(producer.values, producer.headers, strict=True)
        return settings, [
            Record("t", 0, offset, 0, b"r", value, tuple(headers)) for offset, (value, headers) in enumerate(sent)
        ]

    def samples(self, folder: Path, way: str) -> list[Sample]:
        """Return the samples that a trainer reads."""
        settings, records = self.records(folder, way)
        built = build(records, 32, ClaimStore(settings.traces).get)
        assert not built.dead_letters, built.rows["dead_letters"].to_pylist()
        tables = DeltaLog(settings.tables.model_copy(update={"uri": str(folder / "tables")}))
        for name in ("rejected", "accepted"):
            tables.append(name, built.rows[name])
        states = FrozenTarget(Path(settings.target.path), self.layers, torch.device("cpu")).compute_states
        loader = DataLoader(tables, settings.train, self.origin.target, self.origin.line, states)
        loader.poll()
        return [sample for _ in records for sample in loader.next_samples()]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("target"))


def test_claim_check_and_inline_features_give_the_same_sample(served: Served, tmp_path: Path) -> None:
    assert [len(served.records(tmp_path, way)[1]) > 1 for way in ("inline", "claim-check")] == [True, False]
    (inline,), (claimed,) = served.samples(tmp_path / "a", "inline"), served.samples(tmp_path / "b", "claim-check")
    assert torch.equal(inline.features, claimed.features)
    assert inline.tokens.tolist() == claimed.tokens.tolist()
    assert inline.known.tolist() == claimed.known.tolist()
    assert torch.equal(inline.teacher.ids, claimed.teacher.ids)


def test_recomputed_features_equal_those_of_the_engine(served: Served, tmp_path: Path) -> None:
    (inline,), (recomputed,) = served.samples(tmp_path / "a", "inline"), served.samples(tmp_path / "b", "recompute")
    captured = inline.features
    assert recomputed.tokens.tolist() == inline.tokens.tolist()
    assert recomputed.features.dtype == captured.dtype
    torch.testing.assert_close(recomputed.features, captured, rtol=2**-7, atol=1e-3)
    # Features one token later differ a lot.
    assert (recomputed.features[1:] - captured[:-1]).abs().mean() > 0.1


def test_recomputed_features_of_several_chunks_equal_those_of_the_engine(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inline,) = served.samples(tmp_path / "a", "inline")
    monkeypatch.setattr(served, "settings", served.settings)
    served.limit_messages(served.bare * 2 // 3)
    assert len(served.records(tmp_path, "recompute")[1]) > 1
    (recomputed,) = served.samples(tmp_path / "b", "recompute")
    torch.testing.assert_close(recomputed.features, inline.features, rtol=2**-7, atol=1e-3)
    assert int(recomputed.known.sum()) == len(recomputed) - len(REQUEST.prompt) + 1


def test_a_message_without_features_is_much_smaller(served: Served, tmp_path: Path) -> None:
    size = {
        way: sum(len(r.value or b"") for r in served.records(tmp_path / way, way)[1])
        for way in ("inline", "claim-check", "recompute")
    }
    assert max(size["claim-check"], size["recompute"]) < size["inline"] / 2


def test_the_size_of_a_record_includes_its_claim_check_file(served: Served, tmp_path: Path) -> None:
    _, (record,) = served.records(tmp_path, "claim-check")
    (file,) = (tmp_path / "claims").rglob("*.arrow")
    assert record.size == len(record.value or b"") + file.stat().st_size


Breakage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda file: file.unlink(), "claim_missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "claim_corrupt"),
        (lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]), "claim_corrupt"),
    ],
)
def test_a_missing_or_altered_claim_check_is_a_dead_letter_byte_for_byte(
    served: Served, tmp_path: Path, broken: Breakage, reason: str
) -> None:
    settings, (record,) = served.records(tmp_path, "claim-check")
    (file,) = (tmp_path / "claims").rglob("*.arrow")
    broken(file)
    built = build([record], 32, ClaimStore(settings.traces).get)
    (letter,) = built.rows["dead_letters"].to_pylist()
    assert (letter["reason"], letter["value"], letter["rows"]) == (reason, record.value, record.number("rows"))
    assert str(file) in letter["detail"]
    assert built.rows["accepted"].num_rows == built.rows["traces"].num_rows == 0


def test_a_reader_without_a_store_rejects_claim_checks_and_reads_the_rest(served: Served, tmp_path: Path) -> None:
    _, (claimed,) = served.records(tmp_path / "a", "claim-check")
    assert build([claimed], 32).dead_letters == {"claim_foreign": 1}
    _, inline = served.records(tmp_path / "b", "inline")
    assert not build(inline, 32).dead_letters
