"""Run ``aurora demo``: a speculator that starts untrained learns from live traffic."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ops.demo import lossless_check
from ops.demo.record import DemoRun, LosslessResult, describe_measurement, find_faults, summarize_run
from ops.demo.scenario import Scenario
from ops.demo.screen import DemoScreen
from ops.local.process import StartError
from ops.local.stack import running_stack
from ops.local.supervisor import PartFailedError
from ops.report.demo_page import render_demo_page
from schemas.errors import UserError
from schemas.settings import Settings

_EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Command-line options of the demo."""

    fresh: bool = False
    minutes: float = 9.5
    concurrency: int = 4
    max_tokens: int = 64
    as_json: bool = False
    live: bool = True


def run(settings: Settings, options: DemoOptions) -> int:
    """Run the demo, write report and summary, and return the exit code: 0 if the run is sound, else 1.

    Raises:
        UserError: the demo cannot start.
    """
    folder = Path(settings.stack.data_dir) / "demo"
    if "self_generation" not in settings.train.model_fields_set:
        # The demo shows what is learned from traffic, and its node needs the processor when it starts.
        train = settings.train.model_copy(update={"self_generation": 0.0})
        settings = settings.model_copy(update={"train": train})
    with DemoScreen(live=options.live and not options.as_json, to_stderr=options.as_json) as screen:
        finished = run_demo(settings, options, screen)
        write_results(finished, folder)
    sys.stdout.write(format_summary(finished) if options.as_json else format_closing(finished, folder))
    if finished.interrupted:
        return _EXIT_INTERRUPTED
    return 1 if find_faults(finished) else 0


def run_demo(settings: Settings, options: DemoOptions, screen: DemoScreen) -> DemoRun:
    """Start the stack, run the scenario, stop the stack and check the outputs; Ctrl-C or a dead part end it early.

    Raises:
        UserError: the demo cannot start.
    """
    started = time.time()
    scenario: Scenario | None = None
    crashed, interrupted, lossless = None, False, LosslessResult()
    try:
        with running_stack(settings, screen.say, restart=False) as stack:
            if options.fresh:
                wipe_data(settings)
            scenario = Scenario(stack, screen, options.concurrency, options.max_tokens)
            scenario.run(options.minutes)
        lossless = check_lossless(scenario.record(), stack.settings, screen)
    except (PartFailedError, StartError) as error:
        screen.say(str(error))
        crashed = str(error)
    except KeyboardInterrupt:
        interrupted = True
    record = scenario.record() if scenario else DemoRun(started, started)
    return replace(
        record, started=started, ended=time.time(), lossless=lossless, crashed=crashed, interrupted=interrupted
    )


def wipe_data(settings: Settings) -> None:
    """Delete the data of earlier runs; keep the model and the jars.

    Raises:
        UserError: a folder is outside of ``stack.data_dir``, or in an object store.
    """
    root = Path(settings.stack.data_dir).resolve()
    named = {
        "tables.uri": settings.tables.uri,
        "stream.data_dir": settings.stream.data_dir,
        "train.checkpoint_dir": settings.train.checkpoint_dir,
    }
    folders = [root / name for name in ("broker", "registry", "demo")]
    for setting, value in named.items():
        folder = Path(value).resolve()
        if "://" in value or not folder.is_relative_to(root) or folder == root:
            raise UserError(f"--fresh wipes below {root} only, and {setting} is {value}: empty it yourself")
        folders.append(folder)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def check_lossless(record: DemoRun, settings: Settings, screen: DemoScreen) -> LosslessResult:
    """Decode some requests again with the target alone; the stack has stopped, so every core is free."""
    from pipeline.delta import DeltaLog

    chosen = lossless_check.choose_requests(record.requests, record.swaps)
    screen.say(f"decoding {len(chosen)} requests again with the target alone, in fp32")
    traces = DeltaLog(settings.tables).read("traces", lossless_check.COLUMNS)
    result = lossless_check.check_requests(chosen, traces, Path(settings.target.path), os.cpu_count() or 1)
    screen.say(f"{result.checked} requests, {result.tokens} tokens: {result.mismatches} mismatches")
    return result


def write_results(finished: DemoRun, folder: Path) -> None:
    """Write ``summary.json`` and ``report.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(format_summary(finished))
    (folder / "report.html").write_text(render_demo_page(finished))


def format_summary(finished: DemoRun) -> str:
    """Return the summary as JSON text."""
    return json.dumps(summarize_run(finished), indent=2) + "\n"


def format_closing(finished: DemoRun, folder: Path) -> str:
    """Return the closing lines: the measured speed-up, further figures, and the paths of report and summary."""
    figures = summarize_run(finished)
    first_rates = [figures[f"tokens_per_s_first_50{arm}"] for arm in ("_no_speculation", "")]
    return (
        f"\n{describe_measurement(finished)}\n"
        f"first {figures['first_50_requests']} requests, beside the trainer: {figures['first_50_ratio']}x, "
        f"{first_rates[0]} -> {first_rates[1]} tokens/s\n"
        f"{figures['requests']} requests, {figures['failed_requests']} failed; "
        f"acceptance length {figures['acceptance_length_first_50']} at first, "
        f"{figures['acceptance_length_last_50']} at last\n"
        f"{figures['versions_registered']} versions registered, {figures['versions_promoted']} promoted; "
        f"{figures['lossless_checked']} requests decoded again with the target alone, "
        f"{figures['lossless_mismatches']} mismatches; {figures['rows_published']} rows published, "
        f"{figures['rows_in_table']} in the table\n"
        f"report: {folder / 'report.html'}   summary: {folder / 'summary.json'}\n"
        + "".join(f"WRONG: {fault}\n" for fault in find_faults(finished))
    )
