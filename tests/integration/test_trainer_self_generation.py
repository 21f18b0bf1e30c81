"""A trainer without traffic registers a version of self-generated data, and continues with traffic."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat_target import write_chat_target
from trainer_world import HIDDEN, VOCABULARY, World, offline, until

from schemas.settings import Settings
from trainer.release.gate import HeldOutComparison
from trainer.release.registration import SELF_GENERATED_TAG, SelfGeneratedData, render_card
from trainer.train import Trainer


@pytest.fixture
def settings(registry: str, tmp_path: Path) -> Settings:
    write_chat_target(tmp_path / "target", vocabulary=VOCABULARY, hidden=HIDDEN)
    settings = offline(
        tmp_path, registration_interval=1.5, checkpoint_interval=1, self_generation=600, self_generation_idle=0.5
    )
    connected = settings.registry.model_copy(update={"tracking_uri": registry, "timeout": 5})
    return settings.model_copy(update={"registry": connected})


@contextmanager
def running(settings: Settings, world: World) -> Iterator[Trainer]:
    stopping = threading.Event()
    trainer = Trainer(settings, world.target, stopping)
    thread = threading.Thread(target=trainer.run, daemon=True)
    thread.start()
    try:
        yield trainer
    finally:
        stopping.set()
        thread.join(60)
    assert not thread.is_alive()


def test_a_version_is_registered_before_any_traffic_and_traffic_is_trained_on_after_it(settings: Settings) -> None:
    world = World(settings)
    line, registry = world.target.line, world.registry
    with running(settings, world) as trainer:
        until(lambda: trainer.status().registered, "a version")
        assert world.tables.version("accepted") == trainer._loader.cursor, "nothing was written to the tables"
        assert trainer.status().tokens_seen == 0
        assert trainer.status().error is None
        tags = registry.tags(line, "1")
        data = SelfGeneratedData.model_validate_json(tags[SELF_GENERATED_TAG])
        assert data.held_out
        assert data.tokens > 0
        assert tags["parent"] == settings.speculator.day_0
        assert HeldOutComparison.from_tags(tags).samples >= settings.promoter.gate_min_samples
        assert str(data) in render_card(settings, world.target.day_0.shape, tags, {})
        assert trainer._lineage.read(trainer._lineage.mark(trainer.status().step)).requests == ()

        world.serve(60)
        until(lambda: trainer.status().tokens_seen > 0, "traffic to be trained on")
        assert trainer._self_generation.held_out == {}

        def is_held_out_generated() -> bool:
            newest = registry.tags(line, trainer.status().registered[-1])
            return SelfGeneratedData.model_validate_json(newest[SELF_GENERATED_TAG]).held_out

        # A snapshot from before the traffic may still be registered.
        until(lambda: not is_held_out_generated(), "a version that was compared on traffic")
    generated = trainer._self_generated_tokens
    assert generated > 0
    with running(settings, world) as resumed:
        until(lambda: resumed.status().step > 0, "the checkpoint")
        until(lambda: resumed._self_generation._has_traffic, "the traffic to be remembered")
        assert resumed._self_generated_tokens >= generated


def test_a_restart_before_any_traffic_generates_for_the_rest_of_the_period_alone(settings: Settings) -> None:
    world = World(settings)
    with running(settings, world) as trainer:
        until(lambda: trainer._self_generated_tokens > 0, "self-generated samples to be trained on")
        trainer._self_generation._paused_at -= 594
    generated, step = trainer._self_generated_tokens, trainer.status().step
    with running(settings, world) as resumed:
        until(lambda: resumed.status().step > step, "the training to continue")
        assert resumed._self_generated_tokens > generated
        until(lambda: resumed._self_generation._period is None, "the end of the period", timeout_s=30)
        assert resumed._self_generation.paused_s >= 600


def test_before_any_traffic_self_generated_tokens_choose_the_draft_vocabulary(settings: Settings) -> None:
    train = settings.train.model_copy(update={"draft_vocab_min_tokens": 300, "draft_vocab_min_coverage": 0.99})
    speculator = settings.speculator.model_copy(update={"draft_vocab_size": 16})
    settings = settings.model_copy(update={"train": train, "speculator": speculator})
    with running(settings, World(settings)) as trainer:
        changes = "aurora_train_draft_vocab_changes_total"
        until(lambda: trainer.metrics_registry.get_sample_value(changes), "another draft vocabulary")
        assert trainer.status().tokens_seen == 0


def test_in_a_pause_past_prompts_are_answered_again(settings: Settings) -> None:
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"max_epochs": 1})})
    world = World(settings)
    world.serve(60)
    with running(settings, world) as trainer:
        until(lambda: trainer.status().tokens_seen > 0, "traffic to be trained on")
        seen = trainer.status().tokens_seen
        until(lambda: trainer._self_generated_tokens > 0, "self-generated samples to be trained on")
        assert trainer._self_generation.held_out == {}
        world.serve(60)
        until(lambda: trainer.status().tokens_seen > seen, "the new traffic to be trained on")


def test_a_trainer_that_may_not_generate_waits_for_traffic(settings: Settings) -> None:
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"self_generation": 0.0})})
    world = World(settings)
    with running(settings, world) as trainer:
        until(lambda: trainer._self_generation.paused_s > 1, "a pause")
        world.serve(20)
        until(lambda: trainer.status().tokens_seen > 0, "traffic to be trained on")
        assert trainer._self_generation.counts["samples"] == trainer._self_generated_tokens == 0


def test_a_trainer_whose_target_cannot_generate_counts_that_and_trains_on_traffic(
    settings: Settings, tmp_path: Path
) -> None:
    for file in (tmp_path / "target").glob("tokenizer*"):
        file.unlink()
    for file in (tmp_path / "target").glob("*.jinja"):
        file.unlink()
    world = World(settings)
    with running(settings, world) as trainer:
        until(lambda: trainer._self_generation.counts["failures"], "a failure")
        until(
            lambda: trainer.metrics_registry.get_sample_value("aurora_train_self_generation_failures_total") == 1,
            "its counter",
        )
        assert trainer.status().error is None
        world.serve(20)
        until(lambda: trainer.status().tokens_seen > 0, "traffic to be trained on")
