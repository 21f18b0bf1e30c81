"""A version is registered with its figures on the held-out set, each computed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
import torch
from tiny_draft import SHAPE
from torch import Tensor

from schemas.settings import Settings, load
from schemas.speculator.checkpoint import line_name, round_weights
from schemas.speculator.network import EagleDraft, random_draft
from trainer.data.samples import Sample, Teacher
from trainer.data.target import Target
from trainer.loop.divergence_guard import HeldOutScore
from trainer.objective.simulated_acceptance import (
    SampleChains,
    SimulatedAcceptance,
    simulate_acceptance,
    simulate_each,
    sum_acceptance,
)
from trainer.release import evaluation
from trainer.release.evaluation import Evaluation, HeldOutEvaluator
from trainer.release.gate import HeldOutComparison
from trainer.release.registration import LINEAGE_TAG, Registrar, resume_registration
from trainer.release.registry import SpeculatorRegistry, TrainingTable, Version

TARGET = "a" * 32
V = SHAPE.vocab_size
LOOKAHEAD = 2
Register = Callable[[EagleDraft, list[Sample]], str | None]
EMBEDDINGS_VH = torch.randn(V, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0))


class MemoryVersions:
    """Versions of one line, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.named: dict[str, str] = {}
        self.tags_of: dict[str, Mapping[str, str]] = {}

    def aliases(self, _line: str) -> dict[str, str]:
        return self.named

    def versions(self, _line: str) -> list[Version]:
        return [Version(number, datetime.now(UTC), tags, "", "") for number, tags in self.tags_of.items()]

    def tags(self, _line: str, version: str) -> Mapping[str, str]:
        return self.tags_of[version]

    def register(
        self,
        _line: str,
        folder: Path,
        tags: Mapping[str, str],
        _figures: Mapping[str, float],
        _card: str,
        _trained_on: Sequence[TrainingTable],
    ) -> str:
        version = str(len(self.tags_of) + 1)
        self.tags_of[version] = tags
        folder.rename(self.folder / version)
        folder.mkdir()
        return version

    def set_alias(self, _line: str, alias: str, version: str) -> None:
        self.named[alias] = version

    def download(self, _line: str, version: str, _folder: Path) -> Path:
        return self.folder / version


def sample(seed: int, label: str) -> Sample:
    g = torch.Generator().manual_seed(seed)
    teacher_ids = torch.randint(0, SHAPE.draft_vocab_size, (12, 1), generator=g)
    return Sample(
        request=str(seed),
        tokens=torch.randint(0, SHAPE.draft_vocab_size, (12,), generator=g),
        next_token=3,
        features=torch.randn(12, SHAPE.feature_width, generator=g).to(torch.bfloat16),
        known=torch.arange(12) >= 0,
        teacher=Teacher(teacher_ids, torch.zeros(12, 1)),
        label=label,
        prompt_key=str(seed),
    )


SAMPLES = [sample(seed, "code" if seed % 2 else "math") for seed in range(10)]


def draft_of(seed: int) -> EagleDraft:
    """Return a random draft whose large weights make it confident, so that drafts differ in their errors."""
    draft = random_draft(SHAPE, seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                parameter.mul_(15)
    return draft


def best_first() -> list[EagleDraft]:
    """Return the best and the worst of some drafts: far enough apart that any part of the samples separates them."""
    drafts = [draft_of(seed) for seed in range(12)]
    drafts.sort(key=lambda draft: -simulate_acceptance(draft, EMBEDDINGS_VH, SAMPLES, LOOKAHEAD).tokens)
    return [drafts[0], drafts[-1]]


def settings() -> Settings:
    flags = {"serve.num_speculative_tokens": LOOKAHEAD, "train.dtype": "float32", "promoter.gate_label_min_samples": 3}
    return load(environ={}, flags=flags)


def target() -> Target:
    day_0 = best_first()[1]
    return Target(TARGET, line_name(TARGET, day_0.shape, day_0.d2t), EMBEDDINGS_VH, day_0)


@pytest.fixture
def registry(tmp_path: Path) -> MemoryVersions:
    return MemoryVersions(tmp_path)


@pytest.fixture
def evaluator(registry: MemoryVersions) -> HeldOutEvaluator:
    return HeldOutEvaluator(settings(), target(), cast(SpeculatorRegistry, registry))


@pytest.fixture
def register(evaluator: HeldOutEvaluator, registry: MemoryVersions) -> Register:
    """Evaluate a draft on samples and register it if it is better."""
    registrar = Registrar(settings(), target(), cast(SpeculatorRegistry, registry), evaluator)

    def evaluate_and_register(draft: EagleDraft, samples: list[Sample]) -> str | None:
        return registrar.register_if_better(draft, evaluator.evaluate(draft, dict.fromkeys(samples, 1.0)), {}, {})

    return evaluate_and_register


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of samples that were scored, by call with any."""
    calls: list[int] = []

    def counting(draft: EagleDraft, table: Tensor, samples: Sequence[Sample], lookahead: int) -> list[SampleChains]:
        if samples:
            calls.append(len(samples))
        return simulate_each(draft, table, samples, lookahead)

    monkeypatch.setattr(evaluation, "simulate_each", counting)
    return calls


def test_a_version_is_registered_with_figures_of_both_drafts_overall_and_on_each_label(
    register: Register, registry: MemoryVersions
) -> None:
    better, day_0 = best_first()
    assert register(better, SAMPLES) == "1"
    held_out = HeldOutComparison.from_tags(registry.tags_of["1"])
    assert held_out.champion == "day-0-head-0"
    for label, figures in [("code", held_out.labels[1]), ("math", held_out.labels[0]), (None, held_out)]:
        chosen = [sample for sample in SAMPLES if label in {None, sample.label}]
        assert figures.samples == len(chosen)
        own, of_champion = (simulate_acceptance(d, EMBEDDINGS_VH, chosen, LOOKAHEAD) for d in (better, day_0))
        assert figures.accepted_per_step == own.accepted_per_step
        assert figures.champion_accepted_per_step == of_champion.accepted_per_step
    assert [label.label for label in held_out.labels] == ["math", "code"]
    gain = held_out.accepted_per_step - held_out.champion_accepted_per_step
    assert held_out.gain_low is not None
    assert held_out.gain_high is not None
    assert 0 < held_out.gain_low < gain < held_out.gain_high
    assert held_out.prompts == len(SAMPLES)
    metrics = json.loads(registry.tags_of["1"]["metrics"])
    assert (metrics["held_out_gain_low"], metrics["held_out_prompts"]) == (held_out.gain_low, len(SAMPLES))


@pytest.mark.parametrize(("gained", "version"), [((3, 2), "1"), ((9, -8), None)])
def test_a_mean_gain_is_registered_only_if_its_prompts_agree(
    evaluator: HeldOutEvaluator, registry: MemoryVersions, gained: tuple[int, int], version: str | None
) -> None:
    evaluation = gain_over_day_0(evaluator, dict.fromkeys(SAMPLES, 1.0), gained)
    of_day_0 = evaluator.evaluate_version(None, evaluation.weights)
    assert evaluation.score.accepted_per_step > sum_acceptance(of_day_0.values()).accepted_per_step
    registrar = Registrar(settings(), target(), cast(SpeculatorRegistry, registry), evaluator)
    assert registrar.register_if_better(draft_of(0), evaluation, {}, {}) == version


@pytest.mark.parametrize(("code", "version"), [(1.0, None), (1.9, "1")])
def test_a_draft_is_compared_on_the_traffic_that_the_weights_stand_for(
    evaluator: HeldOutEvaluator, registry: MemoryVersions, code: float, version: str | None
) -> None:
    weights = {sample: code if sample.label == "code" else 2 - code for sample in SAMPLES}
    evaluation = gain_over_day_0(evaluator, weights, (-3, 3))
    registrar = Registrar(settings(), target(), cast(SpeculatorRegistry, registry), evaluator)
    assert registrar.register_if_better(draft_of(0), evaluation, {}, {}) == version


def gain_over_day_0(
    evaluator: HeldOutEvaluator, weights: Mapping[Sample, float], gained: tuple[float, float]
) -> Evaluation:
    """Return the evaluation of a draft with so many accepted tokens more on each sample of math and of code."""
    of_day_0 = evaluator.evaluate_version(None, dict.fromkeys(SAMPLES, 1.0))
    accepted = {
        sample: SimulatedAcceptance(tokens + gained[number % 2], verify_steps).weigh(weights[sample])
        for number, (sample, (tokens, verify_steps)) in enumerate(of_day_0.items())
    }
    score = HeldOutScore(loss=1.0, accepted_per_step=sum_acceptance(accepted.values()).accepted_per_step)
    return Evaluation(score, accepted, weights)


def test_a_waiting_candidate_must_be_beaten_too(register: Register, registry: MemoryVersions) -> None:
    better = best_first()[0]
    assert register(better, SAMPLES) == "1"
    assert register(better, SAMPLES) is None
    del registry.named["candidate"]
    assert register(better, SAMPLES) == "2"


def test_a_draft_is_scored_with_the_weights_that_its_version_holds(
    register: Register, evaluator: HeldOutEvaluator
) -> None:
    near = draft_of(3)
    with torch.no_grad():
        # Two tokens tie after rounding, and differ before.
        near.lm_head.weight[1:].copy_(
            near.lm_head.weight[:1] * (1 + 1e-4 * torch.arange(1, len(near.lm_head.weight)))[:, None]
        )
    evaluation = evaluator.evaluate(near, dict.fromkeys(SAMPLES, 1.0))
    rounded = simulate_acceptance(round_weights(near), EMBEDDINGS_VH, SAMPLES, LOOKAHEAD)
    assert evaluation.score.accepted_per_step == rounded.accepted_per_step
    assert simulate_acceptance(near, EMBEDDINGS_VH, SAMPLES, LOOKAHEAD) != rounded


def test_a_champion_is_scored_once_on_each_sample(
    register: Register, registry: MemoryVersions, scored: list[int]
) -> None:
    better = best_first()[0]
    register(better, SAMPLES[:8])
    assert scored == [8, 8], "the draft and day 0"
    registry.named["champion"] = "1"
    scored.clear()
    register(better, SAMPLES[:8])
    assert scored == [8, 8], "the draft and the new champion, which is candidate too"
    scored.clear()
    register(better, SAMPLES[2:])
    assert scored == [8, 2]


def test_samples_that_left_the_held_out_set_are_forgotten(
    register: Register, registry: MemoryVersions, scored: list[int]
) -> None:
    better = best_first()[0]
    for chosen, expected in [(SAMPLES[:5], [5]), (SAMPLES[5:], [5]), (SAMPLES[:5], [5]), (SAMPLES[:5], [])]:
        scored.clear()
        registry.named.clear()
        register(better, chosen)
        assert scored == [5, *expected], "the draft, and the samples that are new to day 0"


def test_a_version_that_its_process_did_not_name_becomes_candidate(registry: MemoryVersions) -> None:
    register_steps(registry, {"1": ("a", 10), "2": ("a", 20)})
    registry.named["candidate"] = "1"
    assert resume(registry, "a", 20) == "2"
    assert registry.named["candidate"] == "2"


def test_a_newer_candidate_of_another_training_stays(registry: MemoryVersions) -> None:
    register_steps(registry, {"1": ("a", 10), "2": ("b", 10)})
    registry.named["candidate"] = "2"
    assert resume(registry, "a", 10) == "1"
    assert registry.named["candidate"] == "2"


@pytest.mark.parametrize(("step", "parent"), [(5, None), (10, "8"), (19, "8"), (20, "10"), (99, "10")])
def test_the_parent_of_resumed_weights_is_the_newest_version_of_their_course_that_is_not_later(
    registry: MemoryVersions, step: int, parent: str | None
) -> None:
    register_steps(registry, {"8": ("a", 10), "9": ("b", 15), "10": ("a", 20)})
    assert resume(registry, "a", step) == parent


def resume(registry: MemoryVersions, lineage: str, step: int) -> str | None:
    return resume_registration(cast(SpeculatorRegistry, registry), "line", lineage, step)


def register_steps(registry: MemoryVersions, versions: Mapping[str, tuple[str, int]]) -> None:
    for number, (lineage, step) in versions.items():
        registry.tags_of[number] = {LINEAGE_TAG: lineage, "metrics": json.dumps({"step": step})}
