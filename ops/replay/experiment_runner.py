"""Run a replay experiment: pin and hold a span of the tables, then train every variant on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from ops.cli.terminal import parse_time
from ops.replay.process_pool import run_in_processes
from ops.replay.ray_runner import run_on_ray
from pipeline.delta import DeltaLog
from pipeline.holds import add_hold
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.speculator.target_fingerprint import target_fingerprint
from trainer.loop.learner import resolve_dtype
from trainer.replay import experiment
from trainer.replay.experiment import ExperimentPlan, TableSpan, VariantResult, VariantTask

Say = Callable[[str], None]

_VERSION_PREFIX = "version:"
_MAX_CLOCK_SKEW = timedelta(minutes=10)
"""Rejected branches are committed before their sample; the clocks of the two commits may differ by this much."""


def experiment_folder(settings: Settings, name: str) -> Path:
    """Return the folder of an experiment."""
    return Path(settings.stack.data_dir) / "replay" / name


def load_variants(files: Sequence[Path], load: Callable[[Path], Settings]) -> dict[str, Settings]:
    """Return the settings of each file by its stem.

    Raises:
        UserError: two files have the same stem, or differ in tables, target or registry.
        SettingsError: a file cannot be read.
    """
    found: dict[str, Settings] = {}
    for file in files:
        if file.stem in found:
            raise UserError(f"--config {file}: another variant is also named {file.stem}; rename the file")
        found[file.stem] = resolve_dtype(load(file))
    first = next(iter(found.values()))
    for name, settings in found.items():
        for section in ("tables", "target", "registry"):
            if getattr(settings, section) != getattr(first, section):
                raise UserError(
                    f"--config {name}: [{section}] differs from the first file's; all variants share one span"
                )
    return found


def prepare_experiment(
    configs: Mapping[str, Settings], log: DeltaLog, name: str, line: str, begin: str | None, end: str | None
) -> tuple[ExperimentPlan, list[VariantTask]]:
    """Pin and hold the span and write the plan, or continue an existing experiment.

    Raises:
        UserError: another experiment has this name.
        GoneError: a part of the span was vacuumed.
    """
    first = next(iter(configs.values()))
    folder = experiment_folder(first, name)
    before = experiment.read_plan(folder)
    target = target_fingerprint(Path(first.target.path), first.target.fingerprint_cache)
    span = _choose_span(log, target, line, begin, end, before.span if before else None)
    digests = {variant: experiment.digest_settings(settings) for variant, settings in configs.items()}
    plan = ExperimentPlan(name=name, span=span, lookahead=first.serve.num_speculative_tokens, variants=digests)
    experiment.write_plan(folder, plan)
    add_hold(log, name, span.versions)
    return plan, [VariantTask(folder, plan, variant, settings) for variant, settings in configs.items()]


def run_tasks(
    tasks: Sequence[VariantTask], processes: int, say: Say, cluster: str | None = None
) -> list[VariantResult]:
    """Return the results in task order; run only tasks without a result.

    Args:
        tasks: One for each variant.
        processes: Parallel variants on the local machine.
        say: Prints a line for each completed task.
        cluster: Address of a Ray cluster that runs the tasks instead.

    Raises:
        UserError: as ``trainer.replay.experiment.run_variant``; or the cluster is unreachable.
    """
    left = [task for task in tasks if experiment.read_result(task) is None]
    if len(left) < len(tasks):
        say(f"{len(tasks) - len(left)} of {len(tasks)} variants are already done")
    for found in run_on_ray(left, cluster) if cluster and left else _run_locally(left, processes):
        seconds = found.training_s + found.scoring_s
        say(f"{found.variant}: {len(found.losses)} steps, {found.trained_tokens:,} tokens, {seconds:.0f} s")
    results = [experiment.read_result(task) for task in tasks]
    return [found for found in results if found is not None]


def _run_locally(tasks: Sequence[VariantTask], processes: int) -> Iterator[VariantResult]:
    if processes == 1 or len(tasks) < 2:
        yield from map(experiment.run_variant, tasks)
        return
    yield from (found for _, found in run_in_processes(experiment.run_variant, tasks, processes))


def _choose_span(
    log: DeltaLog, target: str, line: str, begin: str | None, end: str | None, before: TableSpan | None
) -> TableSpan:
    """Return the span of the options, or that of an existing experiment if they name none or the same."""
    newest = log.version("accepted")
    low = _parse_version(log, begin, before.accepted[0] if before else 0)
    high = _parse_version(log, end, before.accepted[1] if before else newest)
    if before is not None and (low, high, target, line) == (*before.accepted, before.target, before.line):
        return before
    if not 0 <= low < high <= newest:
        raise UserError(f"--from {low} --to {high}: no span of table accepted, which ends at version {newest}")
    return TableSpan(
        accepted=(low, high), rejected=(_rejected_start(log, low), log.version("rejected")), target=target, line=line
    )


def _parse_version(log: DeltaLog, text: str | None, default: int) -> int:
    """Parse ``version:N``, or return the newest version of ``accepted`` at a time."""
    if text is None:
        return default
    if text.startswith(_VERSION_PREFIX):
        number = text.removeprefix(_VERSION_PREFIX)
        if not number.isdecimal():
            raise UserError(f"{text!r} is not a version: write version:120")
        return int(number)
    return log.version_at("accepted", parse_time(text))


def _rejected_start(log: DeltaLog, accepted: int) -> int:
    """Return a version of ``rejected`` that precedes every branch of later samples."""
    oldest = log.oldest_readable("rejected")
    at = log.commit_time("accepted", accepted) if accepted else None
    return oldest if at is None else max(oldest, log.version_at("rejected", at - _MAX_CLOCK_SKEW))
