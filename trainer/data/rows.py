"""Rows of the tables ``accepted`` and ``rejected`` as windows and branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.data.samples import Branch, Teacher, Window

ACCEPTED_COLUMNS = (
    *("topic", "partition", "offset", "time", "request", "target", "line", "label", "speculator"),
    *("position", "tokens", "next_token", "features", "feature_width", "loss_mask"),
    *("top_k", "teacher_ids", "teacher_logprobs"),
)
REJECTED_COLUMNS = (
    *("topic", "partition", "offset", "target", "line", "root_position", "branch", "accepted_prefix"),
    *("draft_logprobs", "top_k", "teacher_ids", "teacher_logprobs"),
)

Row = Mapping[str, Any]


def window_of(row: Row, rejected: Sequence[Row]) -> Window:
    """The window of an accepted row with the branches of its rejected rows."""
    return Window(
        request=row["request"],
        tokens=torch.tensor(row["tokens"], dtype=torch.int64),
        next_token=row["next_token"],
        features=_features(row),
        known=torch.tensor(row["loss_mask"], dtype=torch.bool),
        teacher=_teacher(row),
        branches=tuple(_branch(r, row["position"]) for r in rejected),
        time=row["time"].timestamp(),
        label=row["label"],
    )


def has_beginning(row: Row) -> bool:
    """Whether the features of an accepted row are there or can be recomputed: for that it begins with its request."""
    return bool(row["features"]) or row["position"] == 0


def has_root(rejected: Row, accepted: Row) -> bool:
    """Whether the window holds the feature before the branch's root; otherwise an earlier chunk does."""
    root: int = rejected["root_position"] - accepted["position"]
    return 0 < root < len(accepted["tokens"])


def _features(row: Row) -> Tensor:
    width: int = row["feature_width"]
    if not row["features"]:
        return torch.empty(0, width, dtype=torch.bfloat16)
    return torch.frombuffer(bytearray(row["features"]), dtype=torch.bfloat16).view(-1, width)


def _branch(row: Row, position: int) -> Branch:
    return Branch(
        root=row["root_position"] - position,
        tokens=tuple(row["branch"]),
        accepted_prefix=row["accepted_prefix"],
        draft_logprobs=tuple(row["draft_logprobs"]),
        teacher=_teacher(row),
    )


def _teacher(row: Row) -> Teacher:
    shape = (-1, row["top_k"])
    return Teacher(
        torch.tensor(row["teacher_ids"], dtype=torch.int64).view(shape),
        torch.tensor(row["teacher_logprobs"], dtype=torch.float32).view(shape),
    )
