"""Windows of committed tokens with the target's states and distributions, and padded batches of them.

Shapes: n tokens of a window, F feature width, k teacher width, m nodes of a branch, B windows, T tokens of the longest
window, R branches of a batch, L nodes of the longest branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """The target's likeliest tokens and their log-probabilities, [.., k] each; ids of the target vocabulary."""

    ids: Tensor
    logprobs: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Teacher:
        return Teacher(self.ids[rows], self.logprobs[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A drafted chain that verification did not keep to its end."""

    root: int
    """Index in the window of the token that the branch follows."""
    tokens: tuple[int, ...]
    accepted_prefix: int
    """Nodes that were accepted; ``tokens[accepted_prefix]`` is the first that was not."""
    teacher: Teacher
    """[m, k] the target's distribution after consuming each node."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Consecutive committed tokens of one request."""

    request: str
    tokens: Tensor
    """[n] int64."""
    next_token: int | None
    """Token the target chose after the last one; it has no feature yet."""
    features: Tensor
    """[n, F] bf16: the captured target states after consuming each token; [0, F] while they are to be recomputed."""
    known: Tensor
    """[n] bool: where the target's distribution after consuming the token was recorded."""
    teacher: Teacher
    """[known tokens, k], in order."""
    branches: tuple[Branch, ...] = ()
    before: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 tokens of the request before the window, as far as they are needed to recompute its features."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """Rejected branches of a batch, padded at their ends."""

    window_R: Tensor
    root_R: Tensor
    tokens_RL: Tensor
    learned_RL: Tensor
    """Nodes at or past the first rejected one."""
    teacher_RL: Teacher
    """[R, L, k]."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Windows padded at their ends; ``next_token`` stands behind the others, without feature and teacher."""

    tokens_BT: Tensor
    features_BTF: Tensor
    known_BT: Tensor
    teacher_BT: Teacher
    """[B, T, k]; undefined where ``known_BT`` is false."""
    lengths_B: Tensor
    """Tokens of each window, ``next_token`` included."""
    consumed: int
    """Tokens with features, over all windows."""
    branches: Branches


def cut(window: Window, longest: int) -> list[Window]:
    """Consecutive pieces of at most ``longest`` tokens; those that the trainer could learn nothing from are left out.

    The token after a piece is its ``next_token``; a branch goes to the piece that holds its root and the token before.
    """
    pieces = []
    starts = range(0, len(window), longest)
    for start in starts:
        stop = min(start + longest, len(window))
        known_before, known_within = int(window.known[:start].sum()), int(window.known[start:stop].sum())
        if not known_within:
            continue
        pieces.append(
            Window(
                request=window.request,
                tokens=window.tokens[start:stop],
                next_token=window.next_token if stop == len(window) else int(window.tokens[stop]),
                features=window.features[start:stop],
                known=window.known[start:stop],
                teacher=window.teacher[known_before : known_before + known_within],
                branches=tuple(
                    Branch(b.root - start, b.tokens, b.accepted_prefix, b.teacher)
                    for b in window.branches
                    if start < b.root < stop
                ),
                before=torch.cat([window.before, window.tokens[:start]]),
            )
        )
    return pieces


def collate(windows: Sequence[Window]) -> Batch:
    """A padded batch; features become float32.

    Args:
        windows: at least one.
    """
    lengths = [len(w) + (w.next_token is not None) for w in windows]
    shape = (len(windows), max(lengths))
    widths = [w.teacher.ids.shape[-1] for w in windows] + [b.teacher.ids.shape[-1] for w in windows for b in w.branches]
    tokens = torch.zeros(shape, dtype=torch.int64)
    features = torch.zeros(*shape, windows[0].features.shape[-1])
    known = torch.zeros(shape, dtype=torch.bool)
    teacher = _blank_teacher(*shape, max(widths))
    for b, window in enumerate(windows):
        n = len(window)
        tokens[b, :n] = window.tokens
        if window.next_token is not None:
            tokens[b, n] = window.next_token
        features[b, :n] = window.features
        known[b, :n] = window.known
        rows = known[b].nonzero().flatten()
        _put(teacher, (b, rows), window.teacher)
    return Batch(
        tokens_BT=tokens,
        features_BTF=features,
        known_BT=known,
        teacher_BT=teacher,
        lengths_B=torch.tensor(lengths),
        consumed=sum(len(w) for w in windows),
        branches=_collate_branches(windows, max(widths)),
    )


def _collate_branches(windows: Sequence[Window], width: int) -> Branches:
    flat = [(b, branch) for b, window in enumerate(windows) for branch in window.branches]
    longest = max((len(branch.tokens) for _, branch in flat), default=0)
    tokens = torch.zeros(len(flat), longest, dtype=torch.int64)
    learned = torch.zeros(len(flat), longest, dtype=torch.bool)
    teacher = _blank_teacher(len(flat), longest, width)
    for r, (_, branch) in enumerate(flat):
        m = len(branch.tokens)
        tokens[r, :m] = torch.tensor(branch.tokens)
        learned[r, branch.accepted_prefix : m] = True
        _put(teacher, (r, torch.arange(m)), branch.teacher)
    return Branches(
        window_R=torch.tensor([b for b, _ in flat], dtype=torch.int64),
        root_R=torch.tensor([branch.root for _, branch in flat], dtype=torch.int64),
        tokens_RL=tokens,
        learned_RL=learned,
        teacher_RL=teacher,
    )


def _blank_teacher(*shape: int) -> Teacher:
    return Teacher(torch.zeros(shape, dtype=torch.int64), torch.full(shape, -torch.inf))


def _put(teacher: Teacher, at: tuple[int, Tensor], rows: Teacher) -> None:
    """Write rows of a narrower or equal width; what stays blank has probability zero."""
    k = rows.ids.shape[-1]
    teacher.ids[..., :k][at] = rows.ids.to(torch.int64)
    teacher.logprobs[..., :k][at] = rows.logprobs
