"""Evaluate drafts on the held-out set: the weights in training, and the registered versions beside them."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from schemas.settings import Settings
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import round_weights
from schemas.speculator.network import EagleDraft
from trainer.data.batch import collate, group_by_length
from trainer.data.samples import Sample
from trainer.data.target import Target
from trainer.loop.divergence_guard import HeldOutScore
from trainer.loop.learner import autocast
from trainer.objective.losses import ttt_loss
from trainer.objective.simulated_acceptance import (
    SampleChains,
    SimulatedAcceptance,
    simulate_each,
    sum_acceptance,
    walk_requests,
)
from trainer.release.gate import GainInterval, LabelComparison, estimate_gain
from trainer.release.registry import SpeculatorRegistry


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of a draft on the held-out set."""

    score: HeldOutScore
    accepted: Mapping[Sample, SimulatedAcceptance]
    """Simulated acceptance on each sample, weighted."""
    weights: Mapping[Sample, float]


@dataclass(slots=True)
class _KnownVersion:
    """A version that drafts are compared with."""

    draft: EagleDraft
    chains: dict[Sample, SampleChains] = field(default_factory=dict)
    """On samples of the last held-out set, which has most of its samples in common with the next."""


class HeldOutEvaluator:
    """Evaluates drafts and registered versions of one line; scores each version only once on each sample.

    Threads may share it: at worst, both score a version on the same samples.
    """

    def __init__(self, settings: Settings, target: Target, registry: SpeculatorRegistry) -> None:
        self._settings = settings
        self._target = target
        self._registry = registry
        self._versions: dict[str | None, _KnownVersion] = {}

    def evaluate(self, draft: EagleDraft, samples: Mapping[Sample, float]) -> Evaluation:
        """Return the accepted term of the loss, and the acceptance of chains as long as a node drafts.

        Both are of the version that the draft would become: its weights are rounded as registered ones are.

        Args:
            draft: The draft.
            samples: The held-out set with the samples' weights.
        """
        draft = round_weights(draft)
        accepted = _weigh_walks(samples, self._simulate(draft, list(samples)))
        return Evaluation(self._score(draft, accepted, samples), accepted, samples)

    def evaluate_version(
        self, version: str | None, samples: Mapping[Sample, float]
    ) -> Mapping[Sample, SimulatedAcceptance]:
        """Return the simulated acceptance of a version on each sample, weighted; None is the draft of day 0.

        Raises:
            RegistryError: no answer.
            CheckpointError: the registry's files differ from the registered ones.
        """
        known = self._know(version)
        missing = [sample for sample in samples if sample not in known.chains]
        chains = known.chains | dict(zip(missing, self._simulate(known.draft, missing), strict=True))
        known.chains = chains = {sample: chains[sample] for sample in samples}
        return _weigh_walks(samples, list(chains.values()))

    def score_champion(self, samples: Mapping[Sample, float]) -> HeldOutScore:
        """Return the score of the champion; without one, of the version registered last, or else of the draft of day 0.

        Raises:
            RegistryError: no answer.
            CheckpointError: the registry's files differ from the registered ones.
        """
        aliases = self._registry.aliases(self._target.line)
        champion = aliases.get("champion", aliases.get("candidate"))
        self.keep_only({champion})
        accepted = self.evaluate_version(champion, samples)
        return self._score(self._know(champion).draft, accepted, samples)

    def keep_only(self, versions: Collection[str | None]) -> None:
        """Drop the weights and figures of all other versions."""
        self._versions = {version: known for version, known in self._versions.items() if version in versions}

    def _know(self, version: str | None) -> _KnownVersion:
        known = self._versions.get(version)
        if known is None:
            draft = self._target.day_0 if version is None else read_draft(self._registry, self._target.line, version)
            known = self._versions[version] = _KnownVersion(draft)
        return known

    def _simulate(self, draft: EagleDraft, samples: Sequence[Sample]) -> list[SampleChains]:
        embeddings_VH, lookahead = self._target.embeddings_VH, self._settings.serve.num_speculative_tokens
        with autocast(self._settings.train, embeddings_VH.device):
            return simulate_each(draft, embeddings_VH, samples, lookahead)

    def _score(
        self, draft: EagleDraft, accepted: Mapping[Sample, SimulatedAcceptance], samples: Mapping[Sample, float]
    ) -> HeldOutScore:
        return HeldOutScore(
            loss=self._loss(draft, samples),
            accepted_per_step=accepted_per_step(accepted, samples),
            draft_vocab=hashlib.sha256(draft.d2t.cpu().numpy().tobytes()).hexdigest()[:12],
        )

    @torch.no_grad()
    def _loss(self, draft: EagleDraft, samples: Iterable[Sample]) -> float | None:
        """Return the accepted term of the loss; None if it is not finite."""
        train = self._settings.train.model_copy(
            update={"rejected_weight": 0.0, "rejection_weight": 0.0, "policy_weight": 0.0}
        )
        embeddings_VH = self._target.embeddings_VH
        draft = draft.to(embeddings_VH.device)
        batches = map(collate, group_by_length(list(samples)))
        with autocast(train, embeddings_VH.device):
            losses = [ttt_loss(draft, embeddings_VH, batch.to(embeddings_VH.device), train) for batch in batches]
        loss = sum(part.accepted * part.positions for part in losses) / max(sum(part.positions for part in losses), 1)
        return loss if math.isfinite(loss) else None


def _weigh_walks(samples: Mapping[Sample, float], chains: Sequence[SampleChains]) -> dict[Sample, SimulatedAcceptance]:
    walks = zip(samples.items(), walk_requests(list(samples), chains), strict=True)
    return {sample: walk.weigh(weight) for (sample, weight), walk in walks}


def accepted_per_step(accepted: Mapping[Sample, SimulatedAcceptance], samples: Iterable[Sample]) -> float:
    """Return the accepted tokens per step over samples."""
    return sum_acceptance(accepted[sample] for sample in samples).accepted_per_step


def compare_prompts(
    accepted: Mapping[Sample, SimulatedAcceptance], other: Mapping[Sample, SimulatedAcceptance], error: float
) -> GainInterval | None:
    """Return the gain of a draft over another one on the samples of ``accepted``: see ``estimate_gain``."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in sorted(accepted, key=lambda sample: sample.prompt_key):
        by_prompt.setdefault(sample.prompt_key, []).append(sample)
    own_P2, other_P2 = (
        np.array([sum_acceptance(of[sample] for sample in group) for group in by_prompt.values()]).reshape(-1, 2)
        for of in (accepted, other)
    )
    has_steps_P = own_P2[:, 1] > 0
    return estimate_gain(own_P2[has_steps_P], other_P2[has_steps_P], error)


def compare_labels(
    accepted: Mapping[Sample, SimulatedAcceptance],
    champion: Mapping[Sample, SimulatedAcceptance],
    min_samples: int,
    error: float,
) -> Iterator[LabelComparison]:
    """Compare a draft with the champion on each label; take labels with too few samples together."""
    for label, samples in group_by_label(list(accepted), min_samples).items():
        gain = compare_prompts({sample: accepted[sample] for sample in samples}, champion, error)
        yield LabelComparison(
            label=label,
            accepted_per_step=accepted_per_step(accepted, samples),
            champion_accepted_per_step=accepted_per_step(champion, samples),
            gain_low=gain and gain.low,
            gain_high=gain and gain.high,
            samples=len(samples),
        )


def group_by_label(samples: Sequence[Sample], min_samples: int) -> dict[str | None, list[Sample]]:
    """Group samples by label, the empty label for those without; None holds labels with fewer than ``min_samples``."""
    by_label: dict[str, list[Sample]] = {}
    for sample in samples:
        by_label.setdefault(sample.label or "", []).append(sample)
    large: dict[str | None, list[Sample]] = {
        label: group for label, group in by_label.items() if len(group) >= min_samples
    }
    rest = [sample for group in by_label.values() if len(group) < min_samples for sample in group]
    return large | {None: rest} if rest else large


def read_draft(registry: SpeculatorRegistry, line: str, version: str) -> EagleDraft:
    """Download a version and read its weights.

    Raises:
        RegistryError: no answer.
        CheckpointError: the registry's files differ from the registered ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        return checkpoint.read_checkpoint(registry.download(line, version, Path(folder)), line)
