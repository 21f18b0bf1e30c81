"""Figures of training steps, for the status page, Prometheus and the curves in MLflow."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from trainer.data.data_loader import DataLoader
from trainer.data.table_reader import DROPPED_BRANCHES
from trainer.loop.divergence_guard import HeldOutScore
from trainer.objective.losses import Loss

THROUGHPUT_WINDOW_S = 60.0
"""Seconds over which tokens per second are averaged."""


@dataclass(frozen=True, slots=True)
class StepFigures:
    """Figures of one training step."""

    loss: Loss
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens_per_s: float
    """Trained on, replayed samples and idle time included."""
    lag: int
    """Commits of ``accepted`` that are not read yet."""
    newest: float
    """Unix time of the newest sample of the step; 0 where it is unknown."""
    time: float
    """Unix time of the step."""

    @property
    def newest_age_s(self) -> float | None:
        """Age of the newest sample at the time of the step; None where it is unknown."""
        return self.time - self.newest if self.newest else None

    @property
    def curves(self) -> dict[str, float]:
        """The figures by the name of their MLflow curve."""
        loss = self.loss
        return {
            "loss": float(loss.total),
            "loss_accepted": loss.accepted,
            "loss_rejected": loss.rejected,
            "loss_policy": loss.policy,
            **{f"ttt_step_loss_{k}": value for k, value in enumerate(loss.accepted_K)},
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "tokens_per_second": self.tokens_per_s,
            "lag_commits": float(self.lag),
            **({} if self.newest_age_s is None else {"newest_sample_age_seconds": self.newest_age_s}),
        }


class Throughput:
    """Tokens per second over the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque([(clock(), 0)])

    def add(self, tokens: int) -> float:
        """Count the tokens of a step, and return the rate."""
        now = self._clock()
        self._steps.append((now, tokens))
        while len(self._steps) > 2 and self._steps[1][0] < now - THROUGHPUT_WINDOW_S:
            self._steps.popleft()
        return sum(tokens for _, tokens in list(self._steps)[1:]) / max(now - self._steps[0][0], 1e-9)


class TrainMetrics:
    """The trainer's Prometheus metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"aurora_train_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"aurora_train_{name}", text, labels, registry=registry)

        self.versions_registered = counter("versions_registered", "Registered versions.")
        self.registrations_dropped = counter(
            "registrations_dropped", "Snapshots given up before they were registered, by reason.", "reason"
        )
        for reason in ("replaced", "rolled_back", "shutdown"):
            self.registrations_dropped.labels(reason)
        self.divergence_rollbacks = counter("divergence_rollbacks", "Rollbacks to the last good checkpoint.")
        self.steps_skipped = counter("steps_skipped", "Steps skipped because loss or gradient was not finite.")
        self.steps_without_loss = counter(
            "steps_without_loss", "Batches from which nothing could be learned; they are no training steps."
        )
        self.self_generated_tokens = counter(
            "self_generated_tokens", "Tokens trained on that the target generated itself; part of all tokens."
        )
        self._self_generated = {
            "samples": counter("self_generated_samples", "Samples that the target generated itself."),
            "failures": counter("self_generation_failures", "Failures that ended self-generation until a restart."),
        }
        self._counted = dict.fromkeys(self._self_generated, 0)
        self.evaluations_since_registration = gauge(
            "evaluations_since_registration",
            "Evaluations on the held-out set since the last registration or the start.",
        )
        self.draft_vocab_coverage = gauge(
            "draft_vocab_coverage_ratio", "Share of the output tokens within the draft vocabulary in training."
        )
        self.draft_vocab_changes = counter("draft_vocab_changes", "Changes of the draft vocabulary in training.")
        self.lag_events_dropped = counter("lag_events_dropped", "Lag events that the broker did not take.")
        self._steps = counter("steps", "Training steps.")
        self._tokens = counter("tokens", "Tokens trained on, replayed samples included.")
        self._loss = gauge("loss", "Loss of the last step, by term.", "term")
        self._ttt_step_loss = gauge("ttt_step_loss", "Mean divergence of each step of the training-time test.", "step")
        self._acceptance_length = gauge(
            "acceptance_length", "Tokens per verify step, bonus token included, simulated on the held-out set."
        )
        self._held_out_loss = gauge("held_out_loss", "Loss of the accepted term on the held-out set.")
        self._learning_rate = gauge("learning_rate", "Learning rate of the last step.")
        self._gradient_norm = gauge("gradient_norm", "Gradient norm of the last step, before clipping.")
        self._tokens_per_second = gauge("tokens_per_second", "Tokens trained on, mean over a minute, idle included.")
        self._lag_commits = gauge("lag_commits", "Commits of table accepted that are not read yet.")
        self._lag_seconds = gauge(
            "lag_seconds", "Age of the oldest unread commit; 0 while less than one read is unread."
        )
        self._request_ratio = gauge(
            "request_ratio", "Share of the requests that is trained on; below 1 beyond max_lag."
        )
        self._newest_sample = gauge("newest_sample_timestamp_seconds", "Unix time of the last step's newest sample.")
        self._version_read = gauge("table_version_read", "Version of table accepted up to which rows were read.")
        self._version_latest = gauge("table_version_latest", "Newest version of table accepted.")
        self._samples_waiting = gauge("samples_waiting", "New samples that were read and not trained on yet.")
        self._replay_bytes = gauge("replay_bytes", "Bytes of the replay buffer in memory and on disk.", "place")
        self._rows = gauge("rows", "Rows, samples and branches read, by kind.", "kind")
        self._branches_dropped = counter("branches_dropped", "Branches that are not trained on, by reason.", "reason")
        self._dropped = dict.fromkeys(DROPPED_BRANCHES, 0)
        for reason in DROPPED_BRANCHES:
            self._branches_dropped.labels(reason)

    def update_step(self, figures: StepFigures, tokens: int) -> None:
        """Record a training step."""
        self._steps.inc()
        self._tokens.inc(tokens)
        loss = figures.loss
        for term, value in (("accepted", loss.accepted), ("rejected", loss.rejected), ("policy", loss.policy)):
            self._loss.labels(term).set(value)
        for k, value in enumerate(loss.accepted_K):
            self._ttt_step_loss.labels(str(k)).set(value)
        self._learning_rate.set(figures.learning_rate)
        self._gradient_norm.set(figures.gradient_norm)
        self._tokens_per_second.set(figures.tokens_per_s)
        if figures.newest:
            self._newest_sample.set(figures.newest)

    def update_data_loader(self, loader: DataLoader) -> None:
        """Record the position and the size of the data loader."""
        self._version_read.set(loader.cursor)
        self._version_latest.set(loader.table_version)
        self._lag_commits.set(max(0, loader.table_version - loader.cursor))
        self._lag_seconds.set(loader.lag_s)
        self._request_ratio.set(loader.share)
        self._samples_waiting.set(loader.waiting)
        rows = dict(loader.counts)
        for kind in rows.keys() - DROPPED_BRANCHES.values():
            self._rows.labels(kind).set(rows[kind])
        for reason, kind in DROPPED_BRANCHES.items():
            self._branches_dropped.labels(reason).inc(rows.get(kind, 0) - self._dropped[reason])
            self._dropped[reason] = rows.get(kind, 0)
        for place, size in loader.replay_bytes.items():
            self._replay_bytes.labels(place).set(size)

    def update_self_generation(self, counts: Mapping[str, int]) -> None:
        """Record what ``SelfGeneration.counts`` has counted."""
        for kind, counter in self._self_generated.items():
            counter.inc((count := counts[kind]) - self._counted[kind])
            self._counted[kind] = count

    def update_score(self, score: HeldOutScore) -> None:
        """Record a score on the held-out set."""
        self._acceptance_length.set(1 + score.accepted_per_step)
        if score.loss is not None:
            self._held_out_loss.set(score.loss)
