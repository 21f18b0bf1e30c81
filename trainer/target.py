"""What the trainer needs of the target: its configuration, its fingerprint, and its token embeddings."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from schemas.settings import Settings
from schemas.speculator.checkpoint import CheckpointError, line_of, shape_for_target, target_fingerprint
from schemas.speculator.network import EagleDraft, random_draft

_EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """The frozen model that drafts are made for."""

    fingerprint: str
    line: str
    embeddings_VH: Tensor
    """In the type that the target is stored in."""
    day_0: EagleDraft
    """The random draft that nodes begin with."""

    def new_draft(self) -> EagleDraft:
        """A copy of the draft of day 0, to train."""
        return copy.deepcopy(self.day_0)


def read_target(settings: Settings) -> Target:
    """The target that the settings name, and the speculator line that they fix with it.

    Raises:
        CheckpointError: no model in that folder, or one that the draft network does not fit.
    """
    folder = Path(settings.target.path)
    fingerprint = target_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    shape = shape_for_target(config, settings.speculator.draft_vocabulary)
    day_0 = random_draft(shape, settings.speculator.seed)
    return Target(
        fingerprint=fingerprint,
        line=line_of(fingerprint, shape, day_0.d2t),
        embeddings_VH=token_embeddings(folder),
        day_0=day_0,
    )


def token_embeddings(folder: Path) -> Tensor:
    """The token embeddings [V, H] of a model in Hugging Face format, from whichever shard holds them.

    Raises:
        CheckpointError: no shard holds them.
    """
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            if _EMBEDDINGS in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                embeddings: Tensor = file.get_tensor(_EMBEDDINGS)
                return embeddings
    raise CheckpointError(f"{folder}: no tensor {_EMBEDDINGS} in its safetensors files")
