"""``aurora demo``: a speculator that starts untrained learns from live traffic while one watches."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ops.demo import lossless_check
from ops.demo.record import Lossless, Run, faults, sound, summary
from ops.demo.scenario import Player
from ops.demo.screen import DemoScreen
from ops.local.process import StartError
from ops.local.stack import running_stack
from ops.local.supervisor import PartFailedError
from ops.report.demo_page import page
from schemas.errors import UserError
from schemas.settings import Settings

_INTERRUPTED = 130
_DRAFT_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Options:
    """The demo's flags."""

    fresh: bool = False
    minutes: float = 9.5
    concurrency: int = 8
    max_tokens: int = 64
    as_json: bool = False
    live: bool = True


def run(settings: Settings, options: Options) -> int:
    """Run the whole demo, write report and summary, and return the exit code: 0, or 1 when something was wrong.

    Raises:
        UserError: it could not begin.
    """
    folder = Path(settings.stack.data_dir) / "demo"
    with DemoScreen(live=options.live and not options.as_json, to_stderr=options.as_json) as screen:
        finished = play(settings, options, screen)
        write(finished, folder)
    sys.stdout.write(as_json(finished) if options.as_json else closing(finished, folder))
    if finished.interrupted:
        return _INTERRUPTED
    return 0 if sound(finished) else 1


def play(settings: Settings, options: Options, screen: DemoScreen) -> Run:
    """Start the stack, send the traffic, stop the stack, check; ended early by Ctrl-C or the death of a part.

    Raises:
        UserError: it could not begin.
    """
    started = time.time()
    player: Player | None = None
    crashed, interrupted, checked = None, False, Lossless()
    try:
        with running_stack(drafting_always(settings), screen.say, restart=False) as stack:
            if options.fresh:
                wipe(settings)
            player = Player(stack, screen, options.concurrency, options.max_tokens)
            player.play(options.minutes)
        checked = check(player.record(), stack.settings, screen)
    except (PartFailedError, StartError) as error:
        screen.say(str(error))
        crashed = str(error)
    except KeyboardInterrupt:
        interrupted = True
    seen = player.record() if player else Run(started, started)
    return replace(seen, started=started, ended=time.time(), lossless=checked, crashed=crashed, interrupted=interrupted)


def drafting_always(settings: Settings) -> Settings:
    """Settings with which the node drafts in every verify step, unless they say how much to draft.

    Left to itself a node drafts what pays, which on a small machine is nothing until the draft is good: one would see
    nothing of what is learned until then.
    """
    if {"adaptive_drafting", "num_speculative_tokens"} & settings.serve.model_fields_set:
        return settings
    serve = settings.serve.model_copy(update={"adaptive_drafting": False, "num_speculative_tokens": _DRAFT_TOKENS})
    return settings.model_copy(update={"serve": serve})


def wipe(settings: Settings) -> None:
    """Forget what earlier runs left; the model and the jars stay.

    Raises:
        UserError: a folder to be wiped is not inside ``stack.data_dir``, or is in an object store.
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


def check(seen: Run, settings: Settings, screen: DemoScreen) -> Lossless:
    """Decode a share of the requests again by the target alone; the stack has ended, so every core is free."""
    from pipeline.delta import DeltaLog

    chosen = lossless_check.choose(seen.requests, seen.swaps)
    screen.say(f"decoding {len(chosen)} requests again by the target alone, in fp32")
    traces = DeltaLog(settings.tables).read("traces", lossless_check.COLUMNS)
    result = lossless_check.check(chosen, traces, Path(settings.target.path), os.cpu_count() or 1)
    screen.say(f"{result.checked} requests, {result.tokens} tokens: {result.mismatches} mismatches")
    return result


def write(finished: Run, folder: Path) -> None:
    """Leave ``summary.json`` and ``report.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(as_json(finished))
    (folder / "report.html").write_text(page(finished))


def as_json(finished: Run) -> str:
    """The summary as text."""
    return json.dumps(summary(finished), indent=2) + "\n"


def closing(finished: Run, folder: Path) -> str:
    """The last words: what was seen, and where the picture is."""
    figures = summary(finished)
    return (
        f"\n{figures['requests']} requests, {figures['failed_requests']} failed; "
        f"accepted tokens per step {figures['accepted_per_step_first_50']} at first, "
        f"{figures['accepted_per_step_last_50']} at last; "
        f"tokens/s {figures['tokens_per_s_first_50']} at first, {figures['tokens_per_s_last_50']} at last, "
        f"{figures['tokens_per_s_no_speculation']} without speculation\n"
        f"{figures['versions_registered']} versions registered, {figures['versions_promoted']} promoted; "
        f"{figures['lossless_checked']} requests decoded again by the target alone, "
        f"{figures['lossless_mismatches']} mismatches; {figures['rows_published']} rows published, "
        f"{figures['rows_in_table']} in the table\n"
        f"report: {folder / 'report.html'}   summary: {folder / 'summary.json'}\n"
        + "".join(f"WRONG: {fault}\n" for fault in faults(finished))
    )
