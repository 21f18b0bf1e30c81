"""This machine and the files on it: the target, folders, disks, processors, and its clock beside those of others."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ops.observe.doctor.finding import Finding, Model, Patient, ok, problem, warning
from schemas.settings import Settings, SettingsError

GIB = 1 << 30
LEAST_FREE, LITTLE_FREE = GIB, 5 * GIB
"""Bytes on a disk below which something will fail soon, and below which it is time to look."""
CLOCK_S = 2.0
"""Seconds that two clocks may differ: rows, leases and swaps are compared in seconds."""


def look_at_target(patient: Patient) -> Iterator[Finding]:
    """Whether the model can be served, and which speculator line it gives."""
    from schemas.speculator.checkpoint import CheckpointError
    from schemas.speculator.initial_draft import read_line

    settings, folder = patient.settings, Path(patient.settings.target.path)
    try:
        line = read_line(folder, settings.speculator)
    except SettingsError as error:
        yield problem("target", str(error), "set speculator.draft_vocab_file to a file that `aurora vocabulary` wrote")
        return
    except CheckpointError as error:
        yield problem("target", str(error), "set target.path to a folder in Hugging Face format with safetensors")
        return
    patient.model = Model(line.target, line.name)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        yield problem("target", f"{folder} has no tokenizer", "copy the model's tokenizer files into target.path")
    positions = line.day_0.shape.max_position_embeddings
    if settings.serve.max_model_len > positions:
        found = f"serve.max_model_len is {settings.serve.max_model_len}, the target's context {positions}"
        yield problem("target", found, f"set serve.max_model_len to {positions} or less")
    yield ok("target", f"{settings.target.served_model_name}, fingerprint {line.target}, speculator line {line.name}")


def look_at_folders(patient: Patient) -> Iterator[Finding]:
    """Whether what the processes write to this machine has a place, and room."""
    for setting, folder in local_folders(patient.settings).items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if why := _unwritable(there):
            yield problem("folders", f"{setting} {folder}: {why}", f"set {setting} to a folder that can be written to")
            continue
        free = shutil.disk_usage(there).free
        found = f"{setting} {folder}: {free / GIB:.1f} GiB free"
        fix = f"make room, or set {setting} to a larger disk"
        if free < LEAST_FREE:
            yield problem("folders", found, fix)
        elif free < LITTLE_FREE:
            yield warning("folders", found, fix)
        else:
            yield ok("folders", found)


def local_folders(settings: Settings) -> dict[str, Path]:
    """The folders of this machine that are written to, by the setting that names them."""
    named = {
        "stack.data_dir": settings.stack.data_dir,
        "stream.data_dir": settings.stream.data_dir,
        "train.checkpoint_dir": settings.train.checkpoint_dir,
        "tables.uri": settings.tables.uri,
    }
    if settings.traces.features == "claim-check":
        named["traces.claim_check_uri"] = settings.traces.claim_check_uri
    return {setting: Path(text.removeprefix("file://")).absolute() for setting, text in named.items() if is_local(text)}


def is_local(uri: str) -> bool:
    """Whether an address is a folder of this machine."""
    return "://" not in uri or uri.startswith("file://")


def look_at_processors(patient: Patient) -> Iterator[Finding]:
    """Whether node and trainer ask for more threads than there are processors."""
    cores, serve, train = os.cpu_count() or 1, patient.settings.serve.num_threads, patient.settings.train.num_threads
    if serve + train > cores:
        found = f"serve.num_threads {serve} and train.num_threads {train} on {cores} processors"
        yield warning("processors", found, "lower them, unless node and trainer run on machines of their own")
    else:
        yield ok("processors", f"{cores}, of which node and trainer use {serve + train}")


def look_at_clocks(patient: Patient) -> Iterator[Finding]:
    """How far this machine's clock is from those that were read on the way."""
    for name, ahead in patient.clocks.items():
        found = f"that of the {name} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        if abs(ahead) > CLOCK_S:
            yield problem("clock", found, "keep both by NTP: times of rows, leases and swaps are compared")
        else:
            yield ok("clock", found)


def _unwritable(folder: Path) -> str:
    """Why nothing can be written there; empty where it can."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"-")
    except OSError as error:
        return error.strerror or str(error)
    return ""
