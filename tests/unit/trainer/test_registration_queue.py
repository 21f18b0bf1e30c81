"""Versions are registered beside training: one at a time, with one that waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import cast

import pytest
from prometheus_client import CollectorRegistry
from tiny_draft import SHAPE

from schemas.speculator.network import EagleDraft, random_draft
from trainer.loop.divergence_guard import HeldOutScore
from trainer.loop.metrics import TrainMetrics
from trainer.release.evaluation import Evaluation
from trainer.release.registration import Registrar, TrainingLineage
from trainer.release.registration_queue import MAX_BACKOFF_S, RegistrationQueue, TrainingSnapshot
from trainer.release.registry import RegistryError
from trainer.status import ErrorTracker

DRAFT = random_draft(SHAPE, 0)
TIMEOUT_S = 30.0


class BlockedRegistry:
    """Registers a snapshot when the test allows it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        """Step and parent of each call."""
        self._called = threading.Semaphore(0)
        self._answers: list[str | Exception | None] = []
        self._answered = threading.Semaphore(0)

    def register_if_better(
        self, _draft: EagleDraft, _evaluation: Evaluation, tags: Mapping[str, str], _metrics: Mapping[str, float]
    ) -> str | None:
        self.asked.append((tags["step"], tags["parent"]))
        self._called.release()
        assert self._answered.acquire(timeout=TIMEOUT_S)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait_for_call(self) -> None:
        assert self._called.acquire(timeout=TIMEOUT_S)

    def answer(self, answer: str | Exception | None) -> None:
        self._answers.append(answer)
        self._answered.release()


class Training:
    """A lineage and its queue, driven as the trainer drives them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.registry, self.lineage, self.metrics = BlockedRegistry(), TrainingLineage(), CollectorRegistry()
        self.lineage.start("day-0")
        self.errors = ErrorTracker("train", ("registration",), self.metrics)
        self.queue = RegistrationQueue(
            cast(Registrar, self.registry),
            "line",
            self.lineage,
            self.errors,
            TrainMetrics(self.metrics),
            lambda: self.now,
        )

    def submit(self, step: int, request: str) -> int:
        """Train a step on a request and submit the weights; return their mark."""
        self.lineage.add(step, [request])
        mark = self.lineage.mark(step)
        evaluation = Evaluation(HeldOutScore(loss=1.0, accepted_per_step=1.0), {}, {})
        self.queue.submit(TrainingSnapshot(step, mark, DRAFT, evaluation, {"step": str(step)}, {}))
        self.queue.poll()
        return mark

    def finish(self, answer: str | Exception | None) -> str | None:
        """Let the registration that runs end, and take its result."""
        self.registry.wait_for_call()
        running = self.queue._running
        assert running is not None
        self.registry.answer(answer)
        running.version.exception(TIMEOUT_S)
        return self.queue.poll()

    def count(self, name: str, **labels: str) -> float | None:
        return self.metrics.get_sample_value(f"aurora_train_{name}_total", labels)


@pytest.fixture
def training() -> Iterator[Training]:
    training = Training()
    yield training
    for _ in range(3):
        training.registry.answer(None)


def test_training_goes_on_while_a_version_is_registered(training: Training) -> None:
    training.submit(1, "a")
    for _ in range(3):
        assert training.queue.poll() is None
    assert training.queue.registered == ()
    assert training.finish("1") == "1"
    assert training.queue.poll() is None
    assert training.queue.registered == ("1",)
    assert training.lineage.parent == "1"
    assert training.count("versions_registered") == 1


def test_a_newer_snapshot_replaces_the_waiting_one_and_registers_its_requests(training: Training) -> None:
    assert training.count("registrations_dropped", reason="replaced") == 0
    training.submit(1, "a")
    training.submit(2, "b")
    last = training.submit(3, "c")
    assert training.count("registrations_dropped", reason="replaced") == 1
    training.finish("1")
    record = training.lineage.read(last)
    assert (record.parent, set(record.requests)) == ("1", {"b", "c"})
    training.finish("2")
    assert training.registry.asked == [("1", "day-0"), ("3", "1")]
    assert training.queue.registered == ("1", "2")


def test_a_failure_is_retried_after_a_back_off_that_doubles(training: Training) -> None:
    training.submit(1, "a")
    waits = []
    for _ in range(9):
        training.finish(RegistryError("no answer"))
        waits.append(training.queue._retry_at - training.now)
        training.now = training.queue._retry_at - 0.01
        training.queue.poll()
        assert training.queue._running is None
        training.now += 0.02
        training.queue.poll()
    assert waits[:3] == pytest.approx([1, 2, 4])
    assert max(waits) == waits[-1] == pytest.approx(MAX_BACKOFF_S)
    assert training.count("errors", part="registration") == 9
    assert training.errors.summary == "registration: no answer"
    training.finish("1")
    assert training.queue.registered == ("1",)
    assert training.errors.summary is None
    assert set(training.registry.asked) == {("1", "day-0")}


def test_the_newest_snapshot_is_registered_after_a_failure(training: Training) -> None:
    training.submit(1, "a")
    training.submit(2, "b")
    training.finish(RegistryError("no answer"))
    assert training.count("registrations_dropped", reason="replaced") == 1
    training.submit(3, "c")
    assert training.queue._running is None, "the back-off holds for a newer snapshot too"
    training.now += 2
    training.queue.poll()
    training.finish("1")
    assert training.registry.asked[-1] == ("3", "day-0")
    assert training.count("registrations_dropped", reason="replaced") == 2


def test_requests_of_a_draft_that_is_not_better_count_for_the_next_one(training: Training) -> None:
    training.submit(1, "a")
    training.finish(None)
    mark = training.submit(2, "b")
    assert set(training.lineage.read(mark).requests) == {"a", "b"}
    assert training.queue.registered == ()


def test_an_error_of_another_kind_ends_training(training: Training) -> None:
    training.submit(1, "a")
    with pytest.raises(ZeroDivisionError):
        training.finish(ZeroDivisionError())


def test_a_waiting_snapshot_of_undone_steps_is_given_up(training: Training) -> None:
    training.submit(1, "a")
    training.submit(2, "b")
    training.lineage.roll_back(1, "day-0")
    training.queue.drop_rolled_back()
    assert training.count("registrations_dropped", reason="rolled_back") == 1
    training.finish("1")
    assert training.lineage.parent == "1", "the weights of step 1 are those of version 1"
    assert training.queue._running is None


def test_a_failed_snapshot_of_undone_steps_is_not_retried(training: Training) -> None:
    training.submit(2, "a")
    training.lineage.roll_back(1, "day-0")
    training.finish(RegistryError("no answer"))
    assert training.count("registrations_dropped", reason="rolled_back") == 1
    assert training.queue._waiting is None


def test_the_end_waits_for_what_runs_and_what_waits(training: Training) -> None:
    training.submit(1, "a")
    training.submit(2, "b")
    for version in ("1", "2"):
        training.registry.answer(version)
    training.queue.close(TIMEOUT_S)
    assert training.queue.registered == ("1", "2")
    assert training.count("registrations_dropped", reason="shutdown") == 0


def test_the_end_does_not_wait_longer_than_its_bound(training: Training) -> None:
    training.submit(1, "a")
    training.submit(2, "b")
    ticking = iter(range(1000))
    training.queue._clock = lambda: next(ticking) * 0.05
    training.queue.close(0.1)
    assert training.queue.registered == ()
    assert training.count("registrations_dropped", reason="shutdown") == 2


def test_the_end_does_not_retry(training: Training) -> None:
    training.submit(1, "a")
    training.registry.answer(RegistryError("no answer"))
    training.queue.close(TIMEOUT_S)
    assert training.count("registrations_dropped", reason="shutdown") == 1
    assert len(training.registry.asked) == 1
