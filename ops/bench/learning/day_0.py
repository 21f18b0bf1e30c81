"""The draft before any traffic: what it accepts after a period of self-generation, by the settings that users get."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import torch
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict

from ops.bench import prompts
from ops.bench.harness import Figure, Goal, Say
from ops.bench.learning.recorded_traffic import RecordedTraffic
from ops.bench.learning.trials import results_folder
from schemas.device import select_device
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.speculator.network import EagleDraft
from trainer.data.batch import build_step_batch
from trainer.data.samples import Sample
from trainer.data.self_generation import SelfGeneration, stream_samples
from trainer.data.target import Target, read_target
from trainer.loop.distributed import DistributedLearner, Ranks
from trainer.loop.learner import Learner
from trainer.loop.metrics import TrainMetrics
from trainer.loop.vocabulary_change import VocabularyChange
from trainer.objective.simulated_acceptance import simulate_acceptance
from trainer.release.registration import dump_shaping_settings

LOOKAHEAD = 3
"""Length of the chains that are simulated."""
GOAL = Goal(0.8, at_least=True)
CORES = 2
"""The period lasts as long as two cores need for its processor time: one generates, and one trains."""
_PROGRESS_EVERY_S = 60.0


class Day0Result(BaseModel):
    """The draft after the period."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    untrained: dict[str, float]
    """Accepted tokens per step of the draft of day 0, by domain."""
    accepted: dict[str, float]
    """The same of the trained draft."""
    samples: int
    """Generated."""
    steps: int
    trained_tokens: int
    """Replayed samples each time."""
    processor_s: float
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class TrainedDraft:
    """A draft that was trained on self-generated data alone."""

    draft: EagleDraft
    samples: int
    steps: int
    trained_tokens: int
    processor_s: float


def measure_day_0(settings: Settings, traffic: RecordedTraffic, say: Say) -> Figure:
    """Train on self-generated data, and simulate the acceptance on the recorded traffic, of which nothing was trained.

    The result is kept by everything that it depends on except the code, as those of trials.
    """
    key = hashlib.sha256(f"{dump_shaping_settings(settings)} {traffic.digest}".encode()).hexdigest()[:16]
    file = results_folder(settings) / f"day-0-{key}.json"
    if not file.exists():
        try:
            result = _measure(settings, traffic, say)
        except UserError as error:
            return Figure("day0_accepted", None, goal=GOAL, detail={"why": str(error)})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(result.model_dump_json() + "\n")
    found = Day0Result.model_validate_json(file.read_text())
    return Figure("day0_accepted", fmean(found.accepted.values()), goal=GOAL, detail=found.model_dump())


def train_on_self_generated(settings: Settings, target: Target, say: Say) -> TrainedDraft:
    """Train a draft from day 0 for ``train.self_generation`` of processor time on ``CORES``.

    Raises:
        UserError: the target cannot generate.
    """
    train, trained_tokens = settings.train, 0
    learner = Learner(target.new_draft(), target.embeddings_VH, train)
    vocabulary = VocabularyChange(settings, DistributedLearner(learner, Ranks()), TrainMetrics(CollectorRegistry()))
    source = partial(stream_samples, settings, target.day_0.shape.capture_layers, target.embeddings_VH.device)
    generation = SelfGeneration(train, source, clock=lambda: time.process_time() / CORES)
    began = progress_at = time.process_time()
    while (used := time.process_time() - began) < train.self_generation * CORES:
        if generation.counts["failures"]:
            raise UserError("the target generates nothing: see self_generation_failed in the log")
        samples = generation.next_samples(list)
        if samples:
            learner.step(*build_step_batch(samples, 1, train.gradient_accumulation_steps).batches)
            trained_tokens += sum(map(len, samples))
        else:
            time.sleep(0.05)
        if began + used >= progress_at + _PROGRESS_EVERY_S:
            progress_at = began + used
            vocabulary.update(generation.token_counts, is_generated=True)
            say(f"{used:.0f} s of processor time: {generation.counts['samples']} samples, {learner.steps} steps")
    generation.close(timeout_s=60)
    return TrainedDraft(learner.export_draft(), generation.counts["samples"], learner.steps, trained_tokens, used)


def simulate_domains(draft: EagleDraft, embeddings_VH: torch.Tensor, requests: Sequence[Sample]) -> dict[str, float]:
    """Return the accepted tokens per step of chains of ``LOOKAHEAD`` tokens, by domain."""
    by_domain = {
        domain: [replace(one, branches=()) for one in requests if one.label == domain] for domain in prompts.DOMAINS
    }
    return {
        domain: round(simulate_acceptance(draft, embeddings_VH, own, LOOKAHEAD).accepted_per_step, 4)
        for domain, own in by_domain.items()
    }


def _measure(settings: Settings, traffic: RecordedTraffic, say: Say) -> Day0Result:
    torch.set_num_threads(settings.train.num_threads)
    torch.manual_seed(settings.train.seed)
    target = read_target(settings).to(select_device(settings.train.device, "train.device"))
    say(f"training on self-generated data for {settings.train.self_generation * CORES:.0f} s of processor time")
    started = time.monotonic()
    trained = train_on_self_generated(settings, target, say)
    seconds = time.monotonic() - started
    untrained, accepted = (
        simulate_domains(draft, target.embeddings_VH, traffic.requests) for draft in (target.day_0, trained.draft)
    )
    return Day0Result(
        untrained=untrained,
        accepted=accepted,
        samples=trained.samples,
        steps=trained.steps,
        trained_tokens=trained.trained_tokens,
        processor_s=round(trained.processor_s, 1),
        seconds=round(seconds, 1),
    )
