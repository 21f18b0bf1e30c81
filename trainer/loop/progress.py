"""Figures of a training: what a step came to, for the status, for Prometheus and for the curves in MLflow."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from trainer.loop.divergence_guard import Health
from trainer.objective.losses import Loss

PACE_S = 60.0
"""Seconds that the tokens per second are a mean over."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands after a step."""

    loss: Loss
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens_per_s: float
    """Learned from, replay included, waiting included."""
    lag: int
    """Commits of ``accepted`` that are not read yet."""
    age_s: float | None
    """Age of the newest window of the step; None where its time is not known."""

    @property
    def curves(self) -> dict[str, float]:
        """The same by the names of the curves."""
        loss = self.loss
        return {
            "loss": float(loss.total),
            "loss_accepted": loss.accepted,
            "loss_rejected": loss.rejected,
            "loss_policy": loss.policy,
            **{f"loss_step_{k}": value for k, value in enumerate(loss.accepted_K)},
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "tokens_per_s": self.tokens_per_s,
            "lag_commits": float(self.lag),
            **({} if self.age_s is None else {"newest_window_age_s": self.age_s}),
        }


class Pace:
    """Tokens per second over the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque([(clock(), 0)])

    def add(self, tokens: int) -> float:
        """Count a step's tokens, and give the rate."""
        now = self._clock()
        self._steps.append((now, tokens))
        while len(self._steps) > 2 and self._steps[1][0] < now - PACE_S:
            self._steps.popleft()
        return sum(tokens for _, tokens in list(self._steps)[1:]) / max(now - self._steps[0][0], 1e-9)


class Gauges:
    """What the trainer counts for Prometheus."""

    def __init__(self, metrics: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"aurora_train_{name}", text, labels, registry=metrics)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"aurora_train_{name}", text, registry=metrics)

        self.registered = counter("registered", "Versions registered.")
        self.rollbacks = counter("rollbacks", "Times that training went back to its last good state.")
        self.unfit = counter("unfit_steps", "Steps that were not taken: loss or gradient was not finite.")
        self._steps = counter("steps", "Optimizer steps.")
        self._tokens = counter("tokens", "Tokens passed over, replay included.")
        self._loss = gauge("loss", "Loss of the last step, by term.", "term")
        self._step_loss = gauge("step_loss", "Mean divergence of the last step, by step of the unrolled draft.", "step")
        self._accepted_per_step = gauge("accepted_per_step", "Simulated on the held-out set, bonus excluded.")
        self._held_out_loss = gauge("held_out_loss", "Loss of the accepted term on the held-out set.")
        self._rate = gauge("learning_rate", "Of the last step.")
        self._norm = gauge("gradient_norm", "Of the last step, before clipping.")
        self._pace = gauge("tokens_per_second", "Over the last minute, waiting included.")
        self._lag = gauge("lag_commits", "Commits of accepted that are not read yet.")
        self._age = gauge("newest_window_age_seconds", "Age of the newest window of the last step.")
        self._cursor = gauge("cursor", "Version of accepted that was read last.")
        self._version = gauge("table_version", "Newest version of accepted.")
        self._waiting = gauge("windows_waiting", "New windows that were read and not learned from yet.")
        self._rows = gauge("rows", "Rows and branches by what became of them.", "kind")

    def step(self, progress: Progress, tokens: int) -> None:
        """Count a step."""
        self._steps.inc()
        self._tokens.inc(tokens)
        loss = progress.loss
        for term, value in (("accepted", loss.accepted), ("rejected", loss.rejected), ("policy", loss.policy)):
            self._loss.labels(term).set(value)
        for k, value in enumerate(loss.accepted_K):
            self._step_loss.labels(str(k)).set(value)
        self._rate.set(progress.learning_rate)
        self._norm.set(progress.gradient_norm)
        self._pace.set(progress.tokens_per_s)
        if progress.age_s is not None:
            self._age.set(progress.age_s)

    def feed(self, cursor: int, table_version: int, waiting: int, rows: Mapping[str, int]) -> None:
        """Say where the feed stands."""
        self._cursor.set(cursor)
        self._version.set(table_version)
        self._lag.set(max(0, table_version - cursor))
        self._waiting.set(waiting)
        for kind, count in rows.items():
            self._rows.labels(kind).set(count)

    def compared(self, health: Health) -> None:
        """Show the figures on the held-out set."""
        self._accepted_per_step.set(health.accepted_per_step)
        if health.loss is not None:
            self._held_out_loss.set(health.loss)
