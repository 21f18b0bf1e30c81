"""Log an experiment to MLflow: a parent run, and a child run with curves for each variant."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from ops.replay.experiment_report import Comparison
from schemas.build_info import code_revision
from schemas.settings import Settings
from trainer.release.registry import MetricPoint, SpeculatorRegistry
from trainer.replay.experiment import VariantResult
from trainer.replay.learning_curve import learning_curve, mean_accepted_per_step

LOGGED_FILE = "runs.json"
"""File in the experiment folder that lists the logged runs."""
_POINTS_PER_CALL = 900
_EXPERIMENT = "aurora.replay"


def log_experiment(settings: Settings, comparison: Comparison, folder: Path, variants: dict[str, Settings]) -> str:
    """Log each run once and return the id of the parent run.

    Args:
        settings: Settings with the registry.
        comparison: VariantResults to log.
        folder: Experiment folder; lists the logged runs, so that a second call logs only the rest.
        variants: Settings of each variant.

    Raises:
        RegistryError: the registry is unreachable or rejects a call; the next call continues.
    """
    registry, file = SpeculatorRegistry(settings.registry), folder / LOGGED_FILE
    line, plan = comparison.plan.span.line, comparison.plan
    noted: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}

    def note(name: str, run: str) -> None:
        noted[name] = run
        file.write_text(json.dumps(noted, indent=1) + "\n")

    if "" not in noted:
        tags = {"mlflow.runName": plan.name, _EXPERIMENT: plan.name, "code": code_revision()}
        note("", registry.start_run(line, tags, {**plan.span.versions, "lookahead": plan.lookahead}))
    for result in comparison.results:
        if result.variant not in noted:
            tags = {"mlflow.runName": result.variant, "mlflow.parentRunId": noted[""], _EXPERIMENT: plan.name}
            own = variants[result.variant]
            values = {
                **own.train.model_dump(exclude_defaults=True),
                **own.speculator.model_dump(exclude_defaults=True),
            }
            run = registry.start_run(line, tags, values)
            points = list(_points(result))
            for start in range(0, len(points), _POINTS_PER_CALL):
                registry.log_metrics(run, points[start : start + _POINTS_PER_CALL])
            registry.end_run(run)
            note(result.variant, run)
    registry.end_run(noted[""])
    return noted[""]


def _points(result: VariantResult) -> Iterator[MetricPoint]:
    now = time.time_ns() // 1_000_000
    for value in learning_curve(result.scores):
        yield MetricPoint("accepted_per_step", value.accepted_per_step, value.tokens, now)
    for step, loss in enumerate(result.losses):
        yield MetricPoint("loss", loss, step, now)
    yield MetricPoint("accepted_per_step_whole", mean_accepted_per_step(result.scores), 0, now)
