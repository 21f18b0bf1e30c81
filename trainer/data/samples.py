"""Windows of committed tokens with the target's states and distributions, and padded batches of them.

Shapes: n tokens of a window, F feature width, k teacher width, m nodes of a branch, B windows, T tokens of the longest
window, D drafted tokens that were not kept, P choices of the draft that served.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

KEPT = -1
"""Parent of a drafted token whose own parent was kept."""

_SCORED_AT_ONCE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """The target's likeliest tokens and their log-probabilities, [.., k] each; ids of the target vocabulary."""

    ids: Tensor
    logprobs: Tensor

    def __getitem__(self, rows: int | slice | Tensor) -> Teacher:
        return Teacher(self.ids[rows], self.logprobs[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A drafted chain that verification did not keep to its end."""

    root: int
    """Index in the window of the token that the branch follows."""
    tokens: tuple[int, ...]
    accepted_prefix: int
    """Nodes that were accepted; ``tokens[accepted_prefix]`` is the first that was not."""
    draft_logprobs: tuple[float, ...]
    """[m] what the draft that served gave each node; NaN where the node did not know it."""
    teacher: Teacher
    """[m, k] the target's distribution after consuming each node."""
    weight: float = 1.0
    """How much its loss counts, beside the weight of its window."""

    @property
    def rejected_prob(self) -> float:
        """What the draft that served gave the first token that was rejected; 1 where that is not known."""
        logprob = self.draft_logprobs[self.accepted_prefix]
        return 1.0 if math.isnan(logprob) else math.exp(logprob)


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
    weight: float = 1.0
    """How much its loss counts, beside that of other windows of a step."""
    time: float = 0.0
    """Unix time of its record by the clock of its node; 0 where it is not known."""
    label: str | None = None
    """Of its traffic."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Drafted:
    """The drafted tokens of a batch that were not kept, each one once however many branches share it, by depth.

    The row of a draft is the one before its root: its step 0 predicts the first drafted token, and a token of depth d
    is what its step d reads.
    """

    window_D: Tensor
    row_D: Tensor
    depth_D: Tensor
    token_D: Tensor
    parent_D: Tensor
    """Drafted token before it; ``KEPT`` where that one was kept and so is the window's own."""
    learned_D: Tensor
    """At or past the first rejected one of its branch."""
    prob_D: Tensor
    """What the draft that served gave the token that was rejected; the most, where branches share the token."""
    weight_D: Tensor
    teacher_D: Teacher
    """[D, k] after consuming each."""

    def __len__(self) -> int:
        return len(self.token_D)


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """What the draft that served chose after kept tokens, in verify steps where something of it was rejected.

    A choice whose probability is not known is left out: no ratio to another draft's can be taken.
    """

    window_P: Tensor
    row_P: Tensor
    step_P: Tensor
    """Step of the row that predicts the chosen token."""
    token_P: Tensor
    logprob_P: Tensor
    gain_P: Tensor
    """Tokens that were kept from this one on; 0 where it was rejected."""

    def __len__(self) -> int:
        return len(self.token_P)


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
    weight_B: Tensor
    consumed: int
    """Tokens with features, over all windows."""
    drafted: Drafted
    choices: Choices

    def to(self, device: torch.device) -> Batch:
        """The same on that device; itself where it is there."""
        if self.tokens_BT.device == device:
            return self
        moved: Batch = _moved(self, device)
        return moved


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
                    replace(branch, root=branch.root - start)
                    for branch in window.branches
                    if start < branch.root < stop
                ),
                before=torch.cat([window.before, window.tokens[:start]]),
                weight=window.weight,
                time=window.time,
                label=window.label,
            )
        )
    return pieces


def of_like_length(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """The windows in batches to score: the shortest first, so that little of a batch is padding."""
    by_length = sorted(windows, key=len)
    return (by_length[i : i + _SCORED_AT_ONCE] for i in range(0, len(by_length), _SCORED_AT_ONCE))


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
        weight_B=torch.tensor([w.weight for w in windows]),
        consumed=sum(len(w) for w in windows),
        drafted=_drafted(windows, max(widths)),
        choices=_choices(windows),
    )


@dataclass(slots=True)
class _Node:
    """A drafted token while branches are laid over each other."""

    window: int
    row: int
    depth: int
    token: int
    parent: _Node | None
    branch: Branch
    """The first that has it."""
    learned: bool
    prob: float
    place: int = KEPT


def _drafted(windows: Sequence[Window], width: int) -> Drafted:
    nodes = [node for b, window in enumerate(windows) for node in _overlaid(b, window)]
    nodes.sort(key=lambda node: node.depth)
    teacher = _blank_teacher(len(nodes), width)
    for place, node in enumerate(nodes):
        node.place = place
        _put(teacher, (place,), node.branch.teacher[node.depth - 1])
    return Drafted(
        window_D=_integers(node.window for node in nodes),
        row_D=_integers(node.row for node in nodes),
        depth_D=_integers(node.depth for node in nodes),
        token_D=_integers(node.token for node in nodes),
        parent_D=_integers(KEPT if node.parent is None else node.parent.place for node in nodes),
        learned_D=torch.tensor([node.learned for node in nodes], dtype=torch.bool),
        prob_D=torch.tensor([node.prob for node in nodes]),
        weight_D=torch.tensor([windows[node.window].weight * node.branch.weight for node in nodes]),
        teacher_D=teacher,
    )


def _overlaid(number: int, window: Window) -> Iterable[_Node]:
    """The drafted tokens of a window's branches that are not the window's own, each one once."""
    committed = _committed(window)
    found: dict[tuple[int, tuple[int, ...]], _Node] = {}
    for branch in window.branches:
        parent: _Node | None = None
        for depth, token in enumerate(branch.tokens, start=1):
            if parent is None and committed[branch.root + depth : branch.root + depth + 1] == [token]:
                continue
            path = branch.root, branch.tokens[:depth]
            if path not in found:
                found[path] = _Node(number, branch.root - 1, depth, token, parent, branch, learned=False, prob=0.0)
            parent = found[path]
            parent.learned |= depth > branch.accepted_prefix
            parent.prob = max(parent.prob, branch.rejected_prob)
    return found.values()


def _choices(windows: Sequence[Window]) -> Choices:
    found: dict[tuple[int, int, int, int], tuple[float, int]] = {}
    for b, window in enumerate(windows):
        kept: dict[int, int] = {}
        for branch in window.branches:
            kept[branch.root] = max(kept.get(branch.root, 0), branch.accepted_prefix)
        length = len(_committed(window))
        for branch in window.branches:
            for step in range(min(branch.accepted_prefix + 1, length - branch.root)):
                gain = kept[branch.root] - step if step < branch.accepted_prefix else 0
                key = b, branch.root - 1, step, branch.tokens[step]
                if not math.isnan(branch.draft_logprobs[step]):
                    found[key] = branch.draft_logprobs[step], gain
    return Choices(
        window_P=_integers(key[0] for key in found),
        row_P=_integers(key[1] for key in found),
        step_P=_integers(key[2] for key in found),
        token_P=_integers(key[3] for key in found),
        logprob_P=torch.tensor([logprob for logprob, _ in found.values()]),
        gain_P=torch.tensor([float(gain) for _, gain in found.values()]),
    )


def _moved(record: Any, device: torch.device) -> Any:
    """A record with its tensors, and those of the records in it, on a device."""
    moved: dict[str, Any] = {}
    for part in fields(record):
        value = getattr(record, part.name)
        if isinstance(value, Tensor):
            moved[part.name] = value.to(device)
        elif is_dataclass(value) and not isinstance(value, type):
            moved[part.name] = _moved(value, device)
    return replace(record, **moved)


def _committed(window: Window) -> list[int]:
    return [*window.tokens.tolist(), *([] if window.next_token is None else [window.next_token])]


def _integers(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _blank_teacher(*shape: int) -> Teacher:
    return Teacher(torch.zeros(shape, dtype=torch.int64), torch.full(shape, -torch.inf))


def _put(teacher: Teacher, at: tuple[int | Tensor, ...], rows: Teacher) -> None:
    """Write rows of a narrower or equal width; what stays blank has probability zero."""
    k = rows.ids.shape[-1]
    teacher.ids[..., :k][at] = rows.ids.to(torch.int64)
    teacher.logprobs[..., :k][at] = rows.logprobs
