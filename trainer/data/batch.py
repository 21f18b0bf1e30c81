"""Padded batches of samples, and the batches of one training step over ranks and gradient accumulation.

Shapes: B samples, T tokens of the longest sample, F feature width, k teacher width, D drafted tokens that were not
accepted, P choices of the serving draft.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.data.feature_files import load_features
from trainer.data.samples import Branch, RequestSampling, Sample, Teacher

ACCEPTED_PARENT = -1
"""Parent of a drafted token whose own parent was accepted."""

_SAMPLES_PER_BATCH = 8
"""Samples of a batch that is scored, not trained on."""


@dataclass(frozen=True, slots=True, eq=False)
class DraftedTokens:
    """The drafted tokens of a batch that were not accepted, by depth; a token that branches share appears once.

    The row of a draft is the one before its root: TTT step 0 of that row predicts the first drafted token, and TTT
    step d reads a token of depth d.
    """

    sample_D: Tensor
    row_D: Tensor
    depth_D: Tensor
    token_D: Tensor
    parent_D: Tensor
    """Preceding drafted token; ``ACCEPTED_PARENT`` where that token was accepted, so that the sample holds it."""
    learned_D: Tensor
    """Whether the token is at or past the first rejected one of its branch."""
    prob_D: Tensor
    """Probability that the serving draft gave the rejected token; the largest one of the branches that share it."""
    weight_D: Tensor
    teacher_D: Teacher
    """[D, k] after consuming each token."""

    def __len__(self) -> int:
        return len(self.token_D)


@dataclass(frozen=True, slots=True, eq=False)
class DraftChoices:
    """Tokens that the serving draft chose after accepted tokens, in verify steps that rejected at least one token.

    A choice of unknown probability is excluded: its ratio to another draft's probability is undefined.
    """

    sample_P: Tensor
    row_P: Tensor
    step_P: Tensor
    """TTT step of the row that predicts the chosen token."""
    token_P: Tensor
    logprob_P: Tensor
    gain_P: Tensor
    """Number of tokens accepted from this one on; 0 where it was rejected."""

    def __len__(self) -> int:
        return len(self.token_P)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples padded at their ends; ``next_token`` follows the other tokens, without feature and teacher."""

    tokens_BT: Tensor
    features_BTF: Tensor
    """bf16, as they were recorded: the draft converts them on its device."""
    known_BT: Tensor
    teacher_BT: Teacher
    """[B, T, k]; undefined where ``known_BT`` is false."""
    lengths_B: Tensor
    """Tokens of each sample, ``next_token`` included."""
    own_BT: Tensor
    """Rows that are learned from and scored; the others contribute keys and values only."""
    position_B: Tensor
    """Position of each sample's first token in its request."""
    sampling: tuple[RequestSampling | None, ...]
    """[B] how each sample's tokens were chosen; None where it is unknown."""
    weight_B: Tensor
    suffix_predicted_BT: Tensor
    """Whether the suffix drafter is known to predict the token after this one."""
    drafted: DraftedTokens
    choices: DraftChoices

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the same object if it is there already."""
        if self.tokens_BT.device == device:
            return self
        moved: Batch = _move(self, device)
        return moved


Share = tuple[tuple[Sample, ...], ...]
"""The samples of a rank in one training step, for each gradient accumulation part."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The samples of one training step: collated for rank 0, and as the others collate them themselves."""

    batches: tuple[Batch, ...]
    """One for each gradient accumulation part."""
    shares: tuple[Share, ...]
    """For each rank but the first."""
    tokens: int
    """Tokens with features, over all ranks."""
    newest: float
    """Unix time of the newest sample; 0 where it is unknown."""
    requests: tuple[str, ...] = ()
    """Requests of the samples, without duplicates."""


def build_step_batch(samples: Sequence[Sample], ranks: int, parts: int) -> StepBatch:
    """Spread the samples of a step over ranks and gradient accumulation parts.

    Every rank gets the same number of parts, because each part is a collective operation. A part without samples gets
    one from which nothing is learned.

    Raises:
        FeatureFileError: a file with features cannot be read.
    """
    parts = min(parts, len(samples[::ranks]))
    filler = [_without_targets(samples[0])]
    own, *others = (
        tuple(tuple(samples[rank::ranks][part::parts] or filler) for part in range(parts)) for rank in range(ranks)
    )
    return StepBatch(
        batches=collate_share(own),
        shares=tuple(tuple(tuple(map(_without_preceding, part)) for part in share) for share in others),
        tokens=sum(map(len, samples)),
        newest=max(sample.time for sample in samples),
        requests=tuple(dict.fromkeys(sample.request for sample in samples)),
    )


def collate_share(share: Share) -> tuple[Batch, ...]:
    """Read the features of a rank's samples from their files, and pad them to one batch for each part.

    Raises:
        FeatureFileError: a file with features cannot be read.
    """
    return tuple(collate([load_features(sample) for sample in part]) for part in share)


def group_by_length(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Group samples into batches to score, the shortest first, so that little of a batch is padding."""
    by_length = sorted(samples, key=len)
    return (by_length[i : i + _SAMPLES_PER_BATCH] for i in range(0, len(by_length), _SAMPLES_PER_BATCH))


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad samples to a batch.

    Args:
        samples: At least one.
    """
    lengths = [sample.committed for sample in samples]
    shape = (len(samples), max(lengths))
    widths = [s.teacher.ids.shape[-1] for s in samples] + [b.teacher.ids.shape[-1] for s in samples for b in s.branches]
    tokens_BT = torch.zeros(shape, dtype=torch.int64)
    features_BTF = torch.zeros(*shape, samples[0].features.shape[-1], dtype=samples[0].features.dtype)
    known_BT, own_BT = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    teacher_BT = _blank_teacher(*shape, max(widths))
    suffix_predicted_BT = torch.zeros(shape, dtype=torch.bool)
    for b, sample in enumerate(samples):
        n = len(sample)
        tokens_BT[b, :n] = sample.tokens
        if sample.next_token is not None:
            tokens_BT[b, n] = sample.next_token
        features_BTF[b, :n] = sample.features
        known_BT[b, :n] = sample.known
        if sample.suffix_predicted is not None:
            suffix_predicted_BT[b, :n] = sample.suffix_predicted
        own_BT[b, sample.own_rows] = True
        _write_teacher(teacher_BT, (b, known_BT[b].nonzero().flatten()), sample.teacher)
    return Batch(
        tokens_BT=tokens_BT,
        features_BTF=features_BTF,
        known_BT=known_BT,
        teacher_BT=teacher_BT,
        lengths_B=torch.tensor(lengths),
        own_BT=own_BT,
        position_B=torch.tensor([sample.position for sample in samples]),
        sampling=tuple(sample.sampling for sample in samples),
        weight_B=torch.tensor([sample.weight for sample in samples]),
        suffix_predicted_BT=suffix_predicted_BT,
        drafted=_collate_drafted(samples, max(widths)),
        choices=_collate_choices(samples),
    )


@dataclass(slots=True)
class _Node:
    """A drafted token of a tree that is built from overlapping branches."""

    sample: int
    row: int
    depth: int
    token: int
    parent: _Node | None
    branch: Branch
    """The first branch that contains the token."""
    learned: bool
    prob: float
    index: int = ACCEPTED_PARENT


def _collate_drafted(samples: Sequence[Sample], teacher_width: int) -> DraftedTokens:
    nodes = [node for b, sample in enumerate(samples) for node in _merge_branches(b, sample)]
    nodes.sort(key=lambda node: node.depth)
    teacher = _blank_teacher(len(nodes), teacher_width)
    for index, node in enumerate(nodes):
        node.index = index
        _write_teacher(teacher, (index,), node.branch.teacher[node.depth - 1])
    return DraftedTokens(
        sample_D=_integers(node.sample for node in nodes),
        row_D=_integers(node.row for node in nodes),
        depth_D=_integers(node.depth for node in nodes),
        token_D=_integers(node.token for node in nodes),
        parent_D=_integers(ACCEPTED_PARENT if node.parent is None else node.parent.index for node in nodes),
        learned_D=torch.tensor([node.learned for node in nodes], dtype=torch.bool),
        prob_D=torch.tensor([node.prob for node in nodes]),
        weight_D=torch.tensor([samples[node.sample].weight * node.branch.weight for node in nodes]),
        teacher_D=teacher,
    )


def _merge_branches(number: int, sample: Sample) -> Iterable[_Node]:
    """Return the drafted tokens of a sample's branches that the sample does not contain, without duplicates."""
    committed = sample.committed_tokens()
    found: dict[tuple[int, tuple[int, ...]], _Node] = {}
    for branch in sample.branches:
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


def _collate_choices(samples: Sequence[Sample]) -> DraftChoices:
    found: dict[tuple[int, int, int, int], tuple[float, int]] = {}
    for b, sample in enumerate(samples):
        accepted: dict[int, int] = {}
        for branch in sample.branches:
            accepted[branch.root] = max(accepted.get(branch.root, 0), branch.accepted_prefix)
        for branch in sample.branches:
            for step in range(min(branch.accepted_prefix + 1, sample.committed - branch.root)):
                gain = accepted[branch.root] - step if step < branch.accepted_prefix else 0
                key = b, branch.root - 1, step, branch.tokens[step]
                if not math.isnan(branch.draft_logprobs[step]):
                    found[key] = branch.draft_logprobs[step], gain
    return DraftChoices(
        sample_P=_integers(key[0] for key in found),
        row_P=_integers(key[1] for key in found),
        step_P=_integers(key[2] for key in found),
        token_P=_integers(key[3] for key in found),
        logprob_P=torch.tensor([logprob for logprob, _ in found.values()]),
        gain_P=torch.tensor([float(gain) for _, gain in found.values()]),
    )


def _move(record: Any, device: torch.device) -> Any:
    """Return a record with its tensors, and those of nested records, on a device."""
    moved: dict[str, Any] = {}
    for part in fields(record):
        value = getattr(record, part.name)
        if isinstance(value, Tensor):
            moved[part.name] = value.to(device)
        elif is_dataclass(value) and not isinstance(value, type):
            moved[part.name] = _move(value, device)
    return replace(record, **moved)


def _without_targets(sample: Sample) -> Sample:
    return replace(sample, known=torch.zeros_like(sample.known), teacher=sample.teacher[:0], branches=())


def _without_preceding(sample: Sample) -> Sample:
    """Return what ``collate`` reads of a sample: not the tokens before it, which may be many."""
    return replace(sample, preceding=sample.preceding.new_empty(0))


def _integers(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _blank_teacher(*shape: int) -> Teacher:
    return Teacher(torch.zeros(shape, dtype=torch.int64), torch.full(shape, -torch.inf))


def _write_teacher(teacher: Teacher, at: tuple[int | Tensor, ...], rows: Teacher) -> None:
    """Write rows of an equal or smaller width; the rest of each row keeps probability zero."""
    k = rows.ids.shape[-1]
    teacher.ids[..., :k][at] = rows.ids.to(torch.int64)
    teacher.logprobs[..., :k][at] = rows.logprobs
