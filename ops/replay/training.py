"""An experiment from its flags to its results: its past is pinned and held, then variants learn from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from ops.cli.terminal import moment
from ops.replay import on_ray
from ops.replay.worker_processes import side_by_side
from pipeline.delta import DeltaLog
from pipeline.holds import add_hold
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.speculator.checkpoint import target_fingerprint
from trainer.loop.learner import resolve_dtype
from trainer.replay import experiment
from trainer.replay.experiment import ExperimentPlan, TableSpan, VariantResult, VariantTask

Say = Callable[[str], None]

_VERSION = "version:"
_CLOCKS = timedelta(minutes=10)
"""Branches are committed before their windows, and the clocks of two commits may differ by so much."""


def folder_of(settings: Settings, name: str) -> Path:
    """Where an experiment is kept."""
    return Path(settings.stack.data_dir) / "replay" / name


def variants(files: Sequence[Path], load: Callable[[Path], Settings]) -> dict[str, Settings]:
    """The settings of each file by its stem.

    Raises:
        UserError: two of one name, or that do not share tables, target and registry.
        SettingsError: a file that cannot be read.
    """
    found: dict[str, Settings] = {}
    for file in files:
        if file.stem in found:
            raise UserError(f"--config {file}: another variant is named {file.stem} too; rename the file")
        found[file.stem] = resolve_dtype(load(file))
    first = next(iter(found.values()))
    for name, settings in found.items():
        for section in ("tables", "target", "registry"):
            if getattr(settings, section) != getattr(first, section):
                raise UserError(f"--config {name}: [{section}] differs from the first file's; variants share one past")
    return found


def prepared(
    configs: Mapping[str, Settings], log: DeltaLog, name: str, line: str, begin: str | None, end: str | None
) -> tuple[ExperimentPlan, list[VariantTask]]:
    """Pin and hold the past, and write down the experiment; one that was begun before is gone on with.

    Raises:
        UserError: an experiment of that name is another one.
        GoneError: a part of the past is gone.
    """
    first = next(iter(configs.values()))
    folder = folder_of(first, name)
    before = experiment.read_plan(folder)
    span = _span(log, target_fingerprint(Path(first.target.path)), line, begin, end, before.span if before else None)
    digests = {variant: experiment.digest_settings(settings) for variant, settings in configs.items()}
    plan = ExperimentPlan(name=name, span=span, lookahead=first.serve.num_speculative_tokens, variants=digests)
    experiment.write_plan(folder, plan)
    add_hold(log, name, span.versions)
    return plan, [VariantTask(folder, plan, variant, settings) for variant, settings in configs.items()]


def run(tasks: Sequence[VariantTask], processes: int, say: Say, cluster: str | None = None) -> list[VariantResult]:
    """The results in the order of the tasks; what was done before is only read.

    Args:
        tasks: One for each variant.
        processes: Variants at a time, on this machine.
        say: Told of each that is done.
        cluster: Address of a Ray cluster that runs them in place of this machine.

    Raises:
        UserError: as ``trainer.replay.experiment.run_variant``; or there is no such cluster.
    """
    left = [task for task in tasks if experiment.read_result(task) is None]
    if len(left) < len(tasks):
        say(f"{len(tasks) - len(left)} of {len(tasks)} variants are done already")
    for found in on_ray.learn(left, cluster) if cluster and left else _each(left, processes):
        seconds = found.training_s + found.scoring_s
        say(f"{found.variant}: {len(found.losses)} steps, {found.trained_tokens:,} tokens, {seconds:.0f} s")
    results = [experiment.read_result(task) for task in tasks]
    return [found for found in results if found is not None]


def _each(tasks: Sequence[VariantTask], processes: int) -> Iterator[VariantResult]:
    if processes == 1 or len(tasks) < 2:
        yield from map(experiment.run_variant, tasks)
        return
    yield from (found for _, found in side_by_side(experiment.run_variant, tasks, processes))


def _span(
    log: DeltaLog, target: str, line: str, begin: str | None, end: str | None, before: TableSpan | None
) -> TableSpan:
    """The versions that the flags name; those of an experiment that was begun where they name none, or the same."""
    newest = log.version("accepted")
    low = _version(log, begin, before.accepted[0] if before else 0)
    high = _version(log, end, before.accepted[1] if before else newest)
    if before is not None and (low, high, target, line) == (*before.accepted, before.target, before.line):
        return before
    if not 0 <= low < high <= newest:
        raise UserError(f"--from {low} --to {high}: no span of table accepted, which ends at version {newest}")
    return TableSpan(
        accepted=(low, high), rejected=(_rejected(log, low), log.version("rejected")), target=target, line=line
    )


def _version(log: DeltaLog, text: str | None, default: int) -> int:
    """``version:N``, or the newest version of ``accepted`` at a time."""
    if text is None:
        return default
    if text.startswith(_VERSION):
        number = text.removeprefix(_VERSION)
        if not number.isdecimal():
            raise UserError(f"{text!r} is no version: write version:120")
        return int(number)
    return log.version_at("accepted", moment(text))


def _rejected(log: DeltaLog, accepted: int) -> int:
    """A version of ``rejected`` that was there before any branch of a later window."""
    oldest = log.oldest_readable("rejected")
    at = log.commit_time("accepted", accepted) if accepted else None
    return oldest if at is None else max(oldest, log.version_at("rejected", at - _CLOCKS))
