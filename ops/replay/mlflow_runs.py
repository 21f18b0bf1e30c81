"""An experiment among the runs of MLflow: a run for it, and one below it for each variant, with its curves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from ops.replay.comparison import Comparison
from schemas.build_info import code_revision
from schemas.settings import Settings
from trainer.release.registry import MetricPoint, SpeculatorRegistry
from trainer.replay.experiment import VariantResult
from trainer.replay.learning_curve import learning_curve, mean_accepted_per_step

FILE = "runs.json"
_PER_CALL = 900
_EXPERIMENT = "aurora.replay"


def log(settings: Settings, comparison: Comparison, folder: Path, variants: dict[str, Settings]) -> str:
    """Write the runs, once; gives the id of the parent.

    Args:
        settings: Where the registry is.
        comparison: What to write.
        folder: Of the experiment: notes there what is written, so that a second call writes only the rest.
        variants: The settings of each.

    Raises:
        RegistryError: it cannot be reached, or refuses; the next call goes on.
    """
    registry, file = SpeculatorRegistry(settings.registry), folder / FILE
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
            settled = {
                **own.train.model_dump(exclude_defaults=True),
                **own.speculator.model_dump(exclude_defaults=True),
            }
            run = registry.start_run(line, tags, settled)
            points = list(_points(result))
            for start in range(0, len(points), _PER_CALL):
                registry.log_metrics(run, points[start : start + _PER_CALL])
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
