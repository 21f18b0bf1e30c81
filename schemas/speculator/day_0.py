"""The draft of day 0: what nodes and trainer begin with, made by each of them from the same target and settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from schemas.settings import SettingsError, Speculator
from schemas.speculator.checkpoint import CheckpointError, line_of, shape_for_target, target_fingerprint
from schemas.speculator.network import EagleDraft, random_draft


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A speculator line as target and settings fix it, before anything was learned."""

    target: str
    """Fingerprint of the target."""
    name: str
    day_0: EagleDraft
    """The random draft that all processes begin with."""


def read_line(folder: Path, speculator: Speculator) -> Line:
    """The line of the target in ``folder``. Reads all of the target once: its fingerprint is over every byte.

    Raises:
        CheckpointError: no model in the folder, or one that the draft network does not fit.
        SettingsError: the file that ``speculator.vocabulary`` names cannot be used.
    """
    draft = draft_of_day_0(folder, speculator)
    fingerprint = target_fingerprint(folder)
    return Line(fingerprint, line_of(fingerprint, draft.shape, draft.d2t), draft)


def draft_of_day_0(folder: Path, speculator: Speculator) -> EagleDraft:
    """The random draft for the target in ``folder``. With the target it fixes the speculator line.

    Raises:
        CheckpointError: no configuration in the folder, or one that the draft network does not fit.
        SettingsError: the file that ``speculator.vocabulary`` names cannot be used.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}; set target.path to a model folder") from error
    shape = shape_for_target(
        config,
        speculator.draft_vocabulary,
        variant=speculator.variant,
        intermediate_size=speculator.intermediate_size,
    )
    if not speculator.vocabulary:
        return random_draft(shape, speculator.seed)
    kept_D = read_vocabulary(Path(speculator.vocabulary), shape.vocab_size)
    return random_draft(replace(shape, draft_vocab_size=len(kept_D)), speculator.seed, kept_D)


def read_vocabulary(path: Path, vocabulary: int) -> Tensor:
    """Token ids [D] that the draft can propose, from a JSON list of them.

    Args:
        path: The file.
        vocabulary: V: tokens of the target.

    Raises:
        SettingsError: no such file, or something else than at least two ascending ids below ``vocabulary``.
    """
    named = f"speculator.vocabulary {path}"
    try:
        ids = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SettingsError(f"{named}: no such file; `aurora vocabulary` writes it") from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{named}: not readable as JSON: {error}") from error
    if not isinstance(ids, list) or len(ids) < 2 or not all(type(i) is int for i in ids):
        raise SettingsError(f"{named}: must be a list of token ids")
    if wrong := [b for a, b in pairwise(ids) if a >= b]:
        raise SettingsError(f"{named}: ids must be ascending, and {wrong[0]} follows one that is not below it")
    if not 0 <= ids[0] <= ids[-1] < vocabulary:
        raise SettingsError(f"{named}: ids must be 0 to {vocabulary - 1}, the target's; found {ids[0]} to {ids[-1]}")
    return torch.tensor(ids)
