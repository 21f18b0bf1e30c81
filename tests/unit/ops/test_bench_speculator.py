"""From recorded requests of a real engine to a cached speculator that this engine takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from tiny_target import VOCABULARY, write_tiny_target

from ops.bench import recording, speculator
from ops.bench.prompted import SAMPLED, training_requests
from schemas.errors import UserError
from schemas.settings import Settings, load
from schemas.speculator import checkpoint
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.target import read_target
from trainer.objective.simulated_acceptance import accepted_per_step

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


def test_prompts_are_answered_greedily_first_and_then_in_other_ways() -> None:
    planned = requests(7)
    assert [request.prompt for request in planned] == [*PROMPTS, *PROMPTS, PROMPTS[0]]
    assert [request.temperature for request in planned] == [0.0] * 3 + [SAMPLED] * 4
    assert len({request.seed for request in planned}) == 7
    assert len({request.id for request in planned}) == 7


def test_a_recorded_request_is_read_back_as_the_window_that_the_trainer_learns_from(
    engine: tuple[BuiltinEngine, recording.Recorder], tmp_path: Path
) -> None:
    running, recorder = engine
    planned = requests(4)
    done: list[int] = []
    recording.record(running, recorder, planned, tmp_path / "recorded", done.append)
    assert done == [1, 2, 3, 4]
    for request in planned:
        window = recording.read_window(tmp_path / "recorded", request.id, running.target)
        assert tuple(window.tokens[: len(request.prompt)].tolist()) == request.prompt
        assert window.next_token is not None
        answered = len(window) + 1 - len(request.prompt)
        assert 1 <= answered <= 12
        assert window.features.shape == (len(window), 96)
        assert int(window.known.sum()) == answered, "the teacher is known from the end of the prompt on"


def test_what_is_recorded_is_not_recorded_again(
    engine: tuple[BuiltinEngine, recording.Recorder], tmp_path: Path
) -> None:
    planned = requests(5)
    recording.record(*engine, planned[:3], tmp_path, lambda _number: None)
    assert recording.missing(tmp_path, planned) == planned[3:]


def test_recordings_of_another_target_are_refused(
    engine: tuple[BuiltinEngine, recording.Recorder], tmp_path: Path
) -> None:
    planned = requests(1)
    recording.record(*engine, planned, tmp_path, lambda _number: None)
    with pytest.raises(UserError, match="another model"):
        recording.read_window(tmp_path, planned[0].id, "0" * 32)


def test_training_caches_a_speculator_that_drafts_better_than_the_random_one(
    engine: tuple[BuiltinEngine, recording.Recorder], settings: Settings, tmp_path: Path
) -> None:
    running, recorder = engine
    planned = requests(12)
    recording.record(running, recorder, planned, tmp_path / "recorded", lambda _number: None)
    windows = [recording.read_window(tmp_path / "recorded", request.id, running.target) for request in planned]
    plan = speculator.Plan("tiny", "math", len(planned), max_tokens=12, minutes=2, steps=3)
    target, seconds = read_target(settings), count()
    trained = speculator.Training(
        settings, plan, target, windows, windows, lambda _line: None, clock=lambda: float(next(seconds))
    ).run()

    folder = speculator.folder_of(settings, "tiny")
    draft = checkpoint.read(folder, running.line)
    before = accepted_per_step(target.new_draft(), target.embeddings_VH, windows, 3).length
    after = accepted_per_step(draft, target.embeddings_VH, windows, 3).length
    assert after > before + 0.2
    assert trained.accepted_per_step == pytest.approx(after)
    assert json.loads(folder.with_name("tiny.json").read_text())["accepted_per_step"] == trained.accepted_per_step
    running.check(speculator.find(settings, "tiny", running.line))
    assert running.swap(draft, "tiny").version == "tiny"


def test_a_speculator_that_is_not_cached_is_told_with_the_command_that_makes_one(settings: Settings) -> None:
    with pytest.raises(UserError, match="aurora bench speculator"):
        speculator.find(settings, "nowhere", "line")
