"""Periods of self-generation: their bounds in time and share, the priority of traffic, and what they train on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import pytest
import torch
from chat_target import ASSISTANT, END, USER, write_chat_target
from tiny_target import VOCABULARY, write_tiny_target

from schemas.settings import Settings, Train, load
from trainer.data import self_generation
from trainer.data.conversations import Opening
from trainer.data.draft_vocabulary import TokenCounts, sum_halves
from trainer.data.samples import RequestSampling, Sample, Teacher
from trainer.data.self_generation import (
    MAX_WAITING,
    SelfGeneration,
    _Period,
    is_due,
    rest_after,
    stream_samples,
)
from trainer.data.target import read_target

TRAIN = Train(self_generation=600, self_generation_idle=60, batch_size=4, replay_batch_size=3, held_out_ratio=0.25)


def sample_of(number: int) -> Sample:
    tokens = torch.arange(number, number + 6)
    return Sample(
        request=f"request-{number}",
        tokens=tokens,
        next_token=1,
        features=torch.zeros(6, 4, dtype=torch.bfloat16),
        known=torch.tensor([False, False, True, True, True, True]),
        teacher=Teacher(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)),
        prompt_key=f"prompt-{number}",
    )


@dataclass
class World:
    """A clock, and a source that gives a few samples a second without end."""

    now: float = 0.0
    started: list[tuple[tuple[Opening, ...], int]] = field(default_factory=list)
    fails: bool = False

    def source(self, past: Sequence[Opening], seed: int) -> Iterator[list[Sample]]:
        self.started.append((tuple(past), seed))
        number = 0
        while True:
            if self.fails:
                raise ValueError("no chat template")
            yield [sample_of(number + i) for i in range(4)]
            number += 4

    def generation(self, **train: object) -> SelfGeneration:
        return SelfGeneration(TRAIN.model_copy(update=train), self.source, lambda: self.now)


def nothing() -> list[Sample]:
    return []


def until_some(generation: SelfGeneration, replayed: Callable[[], list[Sample]] = nothing) -> list[Sample]:
    end = monotonic() + 20
    while not (samples := generation.next_samples(replayed)):
        assert monotonic() < end, "no samples"
        sleep(0.005)
    return samples


@pytest.mark.parametrize(
    ("paused", "has_traffic", "due"),
    [
        (0, False, True),
        (599, False, True),
        (600, False, False),
        (59, True, False),
        (60, True, True),
        (660, True, False),
    ],
)
def test_a_period_is_bounded_in_time(paused: float, has_traffic: bool, due: bool) -> None:
    assert is_due(paused, TRAIN, has_traffic=has_traffic) is due
    assert not is_due(paused, TRAIN.model_copy(update={"self_generation": 0}), has_traffic=has_traffic)


def test_nothing_is_trained_on_after_the_time_is_over() -> None:
    world = World()
    generation = world.generation()
    assert len(until_some(generation)) == 4
    world.now = 600
    assert generation.next_samples(nothing) == []
    assert len(world.started) == 1


def test_traffic_ends_the_period_and_only_its_pause_begins_another() -> None:
    world, past = World(), [sample_of(3)]
    generation = world.generation()
    until_some(generation)
    period = generation._period
    assert period
    world.now = 10
    generation.see_traffic()
    assert period.stopping.is_set()
    assert generation.next_samples(lambda: past) == []
    period.thread.join(20)
    assert not period.thread.is_alive()
    world.now = 69
    assert generation.next_samples(lambda: past) == []
    world.now = 70
    until_some(generation, lambda: past)
    (_, first), (openings, second) = world.started
    assert first != second, "another period draws other prompts"
    assert [(one.tokens, one.temperature) for one in openings] == [((3, 4, 5), 0.8)]


def test_a_restart_continues_the_period_with_other_prompts() -> None:
    world = World()
    killed = world.generation()
    until_some(killed)
    world.now = 500
    assert killed.paused_s == 500
    killed.close(20)
    world.now = 1000
    resumed = world.generation()
    resumed.restore(500, has_traffic=False)
    until_some(resumed)
    (_, first), (_, second) = world.started
    assert first != second
    world.now = 1099
    until_some(resumed)
    world.now = 1100
    assert resumed.next_samples(nothing) == []
    assert len(world.started) == 2


def test_a_restart_continues_a_pause_of_the_traffic() -> None:
    world, past = World(), [sample_of(3)]
    generation = world.generation()
    generation.restore(40, has_traffic=True)
    world.now = 19
    assert generation.next_samples(lambda: past) == []
    world.now = 20
    until_some(generation, lambda: past)
    ((openings, _),) = world.started
    assert openings, "it answers past prompts"
    generation.close(20)
    ended = world.generation()
    ended.restore(660, has_traffic=True)
    assert ended.next_samples(lambda: past) == []
    assert len(world.started) == 1


def test_output_tokens_that_are_trained_on_are_counted_once() -> None:
    world = World()
    generation = world.generation(held_out_samples=1)
    seen: dict[str, Sample] = {}
    while len(seen) < 12:
        seen |= {one.request: one for one in until_some(generation)}
    expected = Counter(token for one in seen.values() for token in one.own_output())
    assert sum_halves(generation.token_counts) == expected
    generation.close(20)


def test_after_traffic_the_target_writes_no_prompts() -> None:
    world = World()
    generation = world.generation()
    generation.see_traffic()
    world.now = 100
    assert generation.next_samples(nothing) == []
    assert not world.started


def test_samples_are_held_out_by_prompt_before_traffic_alone() -> None:
    world = World()
    generation = world.generation(held_out_samples=6)
    trained: set[str] = set()
    while len(generation.held_out) < 6 or len(trained) < 60:
        trained |= {one.prompt_key for one in until_some(generation)}
    held_out = {one.prompt_key for one in generation.held_out}
    assert len(held_out) == 6
    assert not held_out & trained
    generation.see_traffic()
    assert generation.held_out == {}
    world.now = 100
    seen: set[str] = set()
    while len(seen) < 30:
        seen |= {one.prompt_key for one in until_some(generation, lambda: [sample_of(3)])}
    assert generation.held_out == {}
    assert held_out & seen, "versions are compared on traffic again"
    generation.close()


@dataclass
class Rests:
    """Stands in for the event that ends a period: records how long the thread rests, and ends after some rests."""

    left: int
    rests: list[float] = field(default_factory=list)

    def wait(self, seconds: float) -> None:
        self.rests.append(seconds)

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_the_generation_rests_for_the_other_share_of_the_time(share: float) -> None:
    world = World()

    def slow() -> Iterator[list[Sample]]:
        while True:
            world.now += 0.2
            yield []

    train = TRAIN.model_copy(update={"self_generation_share": share})
    counts = SelfGeneration(train, world.source).counts
    period = _Period(train, slow(), counts, TokenCounts(), lambda: world.now, None)
    rests = Rests(50)
    period.stopping = rests  # type: ignore[assignment]
    period.run()
    busy = len(rests.rests) * 0.2
    assert busy / (busy + sum(rests.rests)) == pytest.approx(share)


def test_the_training_rests_for_the_other_share_of_the_time() -> None:
    world = World()
    generation = world.generation(self_generation_share=0.25)
    until_some(generation)
    world.now = 2.0  # The training step took two seconds.
    assert generation.next_samples(nothing) == []
    world.now = 7.9
    assert generation.next_samples(nothing) == []
    world.now = 8.0
    assert generation.next_samples(nothing)
    assert rest_after(2.0, 0.25) == 6.0
    generation.close()


def test_the_generation_waits_for_the_training() -> None:
    world = World()
    generation = world.generation(held_out_samples=1)
    until_some(generation)
    period = generation._period
    assert period
    sleep(0.3)
    assert MAX_WAITING <= len(period.waiting) < MAX_WAITING + 4
    generation.close(20)
    assert not period.thread.is_alive()


def test_a_failure_is_counted_and_ends_self_generation() -> None:
    world = World(fails=True)
    generation = world.generation()
    assert generation.next_samples(nothing) == []
    period = generation._period
    assert period
    period.thread.join(20)
    assert generation.counts["failures"] == 1
    generation.see_traffic()
    world.now = 100
    assert generation.next_samples(lambda: [sample_of(3)]) == []
    assert len(world.started) == 1


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    target = write_chat_target(tmp_path / "target")
    return load(environ={}, flags={"target.path": str(target), "speculator.draft_vocab_size": VOCABULARY})


def stream(settings: Settings, past: Sequence[Opening] = (), seed: int = 0) -> list[Sample]:
    layers = read_target(settings).day_0.shape.capture_layers
    found: list[Sample] = []
    for samples in stream_samples(settings, layers, torch.device("cpu"), past, seed):
        found += samples
        if len(found) >= 40:
            break
    return found


def test_the_target_writes_prompts_by_its_template_and_answers_greedily_and_sampled(settings: Settings) -> None:
    found = stream(settings)
    for one in found:
        end = int(one.known.nonzero()[0]) + 1
        assert one.tokens[0] == USER
        assert one.tokens[end - 2 : end].tolist() == [END, ASSISTANT]
    assert {one.sampling for one in found} == {RequestSampling(0.0, 1.0, 0), RequestSampling(0.8, 1.0, 0)}
    assert len({one.request for one in found}) == len(found)
    again, other = stream(settings), stream(settings, seed=1)
    assert [one.committed_tokens() for one in again] == [one.committed_tokens() for one in found]
    assert {one.prompt_key for one in other} != {one.prompt_key for one in found}


def test_past_prompts_are_answered_again(settings: Settings) -> None:
    past = [Opening((USER, 9, 9, END, ASSISTANT), 0.8, label="a"), Opening((USER, 8, END, ASSISTANT), 0.8, label="b")]
    found = stream(settings, past)
    prompts = {(tuple(one.tokens[: int(one.known.nonzero()[0]) + 1].tolist()), one.label) for one in found}
    assert prompts == {(one.tokens, one.label) for one in past}
    assert {one.sampling for one in found} == {RequestSampling(0.8, 1.0, 0)}
    assert len({tuple(one.committed_tokens()) for one in found}) > 20, "each time with another answer"


def test_a_large_target_is_not_loaded_with_default_settings_which_is_no_failure(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(self_generation, "GeneratingTarget", lambda *given: loaded.append(given))
    layers = read_target(settings).day_0.shape.capture_layers
    for number in range(2):
        with (Path(settings.target.path) / f"model-{number}.safetensors").open("wb") as sparse:
            sparse.truncate(600 << 20)
    generation = SelfGeneration(settings.train, partial(stream_samples, settings, layers, torch.device("cpu")))
    assert generation.next_samples(nothing) == []
    assert generation._period
    generation._period.thread.join(20)
    assert not generation._period.thread.is_alive()
    assert generation.next_samples(nothing) == []
    assert generation.counts == {"failures": 0, "samples": 0}
    assert not loaded


def replace_train(settings: Settings, train: Train) -> Settings:
    return settings.model_copy(update={"train": train})


def test_a_target_without_a_template_is_an_error(tmp_path: Path) -> None:
    target = write_tiny_target(tmp_path / "target")
    with pytest.raises((OSError, ValueError)):
        stream(load(environ={}, flags={"target.path": str(target), "speculator.draft_vocab_size": VOCABULARY}))


def test_positions_that_the_suffix_drafter_predicts_are_marked_where_they_are_weighted(settings: Settings) -> None:
    assert all(one.suffix_predicted is None for one in stream(settings))
    train = settings.train.model_copy(update={"suffix_predicted_weight": 0.5})
    assert all(one.suffix_predicted is not None for one in stream(replace_train(settings, train)))
