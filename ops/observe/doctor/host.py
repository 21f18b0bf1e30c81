"""Checks of the local machine: target, folders, disks, processors and clock."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ops.observe.doctor.checks import CheckContext, Finding, ModelIdentity, ok, problem, warning
from schemas.settings import Settings, SettingsError

GIB = 1 << 30
MIN_FREE, LOW_FREE = GIB, 5 * GIB
"""Free bytes on a disk below which a check reports a problem, and a warning."""
MAX_CLOCK_SKEW_S = 2.0
"""Tolerated clock difference: times of rows, leases and swaps are compared in seconds."""


def check_target(context: CheckContext) -> Iterator[Finding]:
    """Check that the model can be served, and derive its speculator line."""
    from schemas.speculator.checkpoint import CheckpointError
    from schemas.speculator.day_0_draft import read_line

    settings, folder = context.settings, Path(context.settings.target.path)
    try:
        line = read_line(settings.target, settings.speculator)
    except SettingsError as error:
        yield problem("target", str(error), "set speculator.draft_vocab_file to a file that `aurora vocabulary` wrote")
        return
    except CheckpointError as error:
        yield problem("target", str(error), "set target.path to a folder in Hugging Face format with safetensors")
        return
    context.model = ModelIdentity(line.target, line.name)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        yield problem("target", f"{folder} has no tokenizer", "copy the model's tokenizer files into target.path")
    positions = line.day_0_draft.shape.max_position_embeddings
    if settings.serve.max_model_len > positions:
        found = f"serve.max_model_len is {settings.serve.max_model_len}, the target's context {positions}"
        yield problem("target", found, f"set serve.max_model_len to {positions} or less")
    yield ok("target", f"{settings.target.served_model_name}, fingerprint {line.target}, speculator line {line.name}")


def check_folders(context: CheckContext) -> Iterator[Finding]:
    """Check that the local folders are writable and have free space."""
    for setting, folder in local_folders(context.settings).items():
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if reason := _why_unwritable(existing):
            yield problem(
                "folders", f"{setting} {folder}: {reason}", f"set {setting} to a folder that can be written to"
            )
            continue
        free = shutil.disk_usage(existing).free
        found = f"{setting} {folder}: {free / GIB:.1f} GiB free"
        fix = f"make room, or set {setting} to a larger disk"
        if free < MIN_FREE:
            yield problem("folders", found, fix)
        elif free < LOW_FREE:
            yield warning("folders", found, fix)
        else:
            yield ok("folders", found)


def local_folders(settings: Settings) -> dict[str, Path]:
    """Return the local folders that the processes write to, by setting."""
    named = {
        "stack.data_dir": settings.stack.data_dir,
        "stream.data_dir": settings.stream.data_dir,
        "train.checkpoint_dir": settings.train.checkpoint_dir,
        "tables.uri": settings.tables.uri,
    }
    if settings.train.spill_dir:
        named["train.spill_dir"] = settings.train.spill_dir
    if settings.traces.features == "claim-check":
        named["traces.claim_check_uri"] = settings.traces.claim_check_uri
    return {setting: Path(text.removeprefix("file://")).absolute() for setting, text in named.items() if is_local(text)}


def is_local(uri: str) -> bool:
    """Return whether a URI is a local folder."""
    return "://" not in uri or uri.startswith("file://")


def check_processors(context: CheckContext) -> Iterator[Finding]:
    """Check that node and trainer do not use more threads than there are processors."""
    cores, serve, train = os.cpu_count() or 1, context.settings.serve.num_threads, context.settings.train.num_threads
    if serve + train > cores:
        found = f"serve.num_threads {serve} and train.num_threads {train} on {cores} processors"
        yield warning("processors", found, "lower them, unless node and trainer run on separate machines")
    else:
        yield ok("processors", f"{cores}, of which node and trainer use {serve + train}")


def check_clocks(context: CheckContext) -> Iterator[Finding]:
    """Compare the local clock with the clocks that earlier checks read."""
    for name, ahead in context.clocks.items():
        found = f"the clock of the {name} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the local one"
        if abs(ahead) > MAX_CLOCK_SKEW_S:
            yield problem("clock", found, "synchronize both with NTP: times of rows, leases and swaps are compared")
        else:
            yield ok("clock", found)


def _why_unwritable(folder: Path) -> str:
    """Return why a folder is not writable; empty if it is."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"-")
    except OSError as error:
        return error.strerror or str(error)
    return ""
