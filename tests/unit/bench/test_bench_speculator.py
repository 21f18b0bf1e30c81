"""Record requests with a real engine, train a speculator on them, and load it from the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from tiny_target import VOCABULARY, write_tiny_target

from ops.bench import recording, speculator
from ops.bench.prompts import training_requests
from schemas.errors import UserError
from schemas.settings import Settings, load
from schemas.speculator import checkpoint
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.target import read_target
from trainer.objective.simulated_acceptance import simulate_acceptance

PROMPTS = [(3, 7, 11, 13), (5, 2, 9), (8, 8, 21, 4, 6)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("bench")
    target = write_tiny_target(folder / "target")
    flags = {
        "target.path": str(target),
        "speculator.draft_vocab_size": VOCABULARY,
        "stack.data_dir": str(folder),
        "serve.max_model_len": 64,
        "serve.weight_dtype": "float32",
        "train.learning_rate": 5e-3,
    }
    return load(environ={}, flags=flags)


@pytest.fixture(scope="module")
def engine(settings: Settings) -> Iterator[tuple[BuiltinEngine, recording.Recorder]]:
    recorder = recording.Recorder()
    running = BuiltinEngine(settings, recorder)
    running.start()
    yield running, recorder
    running.stop()


def requests(count: int) -> list[Request]:
    return training_requests("math", PROMPTS, count, max_tokens=12)


def test_a_recorded_request_is_read_back_as_a_training_sample(
    engine: tuple[BuiltinEngine, recording.Recorder], tmp_path: Path
) -> None:
    running, recorder = engine
    planned = requests(4)
    done: list[int] = []
    recording.record_requests(running, recorder, planned, tmp_path / "recorded", done.append)
    assert done == [1, 2, 3, 4]
    for request in planned:
        sample = recording.read_recorded_sample(tmp_path / "recorded", request.id, running.target)
        assert tuple(sample.tokens[: len(request.prompt)].tolist()) == request.prompt
        assert sample.next_token is not None
        answered = len(sample) + 1 - len(request.prompt)
        assert 1 <= answered <= 12
        assert sample.features.shape == (len(sample), 96)
        assert int(sample.known.sum()) == answered, "the teacher is known from the end of the prompt on"


def test_recorded_requests_are_not_missing(engine: tuple[BuiltinEngine, recording.Recorder], tmp_path: Path) -> None:
    planned = requests(5)
    recording.record_requests(*engine, planned[:3], tmp_path)
    assert recording.find_missing(tmp_path, planned) == planned[3:]


def test_recordings_of_another_target_are_rejected(
    engine: tuple[BuiltinEngine, recording.Recorder], tmp_path: Path
) -> None:
    planned = requests(1)
    recording.record_requests(*engine, planned, tmp_path)
    with pytest.raises(UserError, match="another model"):
        recording.read_recorded_sample(tmp_path, planned[0].id, "0" * 32)


def test_training_caches_a_speculator_that_is_better_than_a_random_one(
    engine: tuple[BuiltinEngine, recording.Recorder], settings: Settings, tmp_path: Path
) -> None:
    running, recorder = engine
    planned = requests(12)
    recording.record_requests(running, recorder, planned, tmp_path / "recorded")
    samples = [recording.read_recorded_sample(tmp_path / "recorded", request.id, running.target) for request in planned]
    options = speculator.SpeculatorOptions("tiny", "math", len(planned), max_tokens=12, minutes=2, steps=3)
    target, seconds = read_target(settings), count()
    trained = speculator.OfflineTraining(
        settings, options, target, samples, samples, lambda _line: None, clock=lambda: float(next(seconds))
    ).run()

    folder = speculator.cache_folder(settings, "tiny")
    draft = checkpoint.read_checkpoint(folder, running.line)
    before = simulate_acceptance(target.new_draft(), target.embeddings_VH, samples, 3).accepted_per_step
    after = simulate_acceptance(draft, target.embeddings_VH, samples, 3).accepted_per_step
    assert after > before + 0.2
    assert trained.accepted_per_step == pytest.approx(after)
    assert json.loads(folder.with_name("tiny.json").read_text())["accepted_per_step"] == trained.accepted_per_step
    running.check(speculator.load_speculator(settings, "tiny", running.line))
    assert running.swap(draft, "tiny").version == "tiny"


def test_a_missing_speculator_names_the_command_that_trains_one(settings: Settings) -> None:
    with pytest.raises(UserError, match="aurora bench speculator"):
        speculator.load_speculator(settings, "nowhere", "line")
