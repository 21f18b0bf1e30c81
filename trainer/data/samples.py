"""Training samples: consecutive committed tokens of a request, with the target's states and distributions.

A row of the table ``accepted`` becomes a ``Sample``; its rows of ``rejected`` become the sample's branches. The samples
of a request's chunks are joined, and the result is cut into samples of bounded size. A cut changes no position and no
training signal: each part keeps tokens of the request before and after those that it is responsible for.

Shapes: n tokens of a sample, F feature width, k teacher width, m nodes of a branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from schemas.speculator.acceptance import MIN_TEMPERATURE
from schemas.speculator.draft_context import LOOKAHEAD_TOKENS
from schemas.suffix_corpus import SequenceHistory, likeliest_chain
from schemas.trace.record import DraftSource

ACCEPTED_COLUMNS = (
    *("topic", "partition", "offset", "time", "request", "target", "line", "label", "speculator"),
    *("position", "tokens", "next_token", "features", "feature_width", "loss_mask"),
    *("top_k", "teacher_ids", "teacher_logprobs", "last_chunk", "temperature", "top_p", "sampling_top_k"),
    "prompt_key",
)
REJECTED_COLUMNS = (
    *("topic", "partition", "offset", "target", "line", "root_position", "branch", "accepted_prefix"),
    *("draft_logprobs", "top_k", "teacher_ids", "teacher_logprobs", "draft_sources"),
)

UNLABELLED = "(none)"
"""Name of the traffic without a label."""

Row = Mapping[str, Any]

ComputeStates = Callable[[Tensor], Tensor]
"""Return the target's captured states [n, F] in bf16 after each of the first n tokens of a request."""


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """The target's likeliest tokens and their log-probabilities, [.., k] each; ids of the target vocabulary."""

    ids: Tensor
    logprobs: Tensor

    def __getitem__(self, rows: int | slice | Tensor) -> Teacher:
        return Teacher(self.ids[rows], self.logprobs[rows])


@dataclass(frozen=True, slots=True)
class RequestSampling:
    """How the tokens of a request were sampled."""

    temperature: float
    top_p: float
    top_k: int
    """Most likely tokens that were sampled from; 0 for all."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token was always chosen."""
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """The file that holds a sample's features: bf16 [rows, width] in the byte order of the machine."""

    path: str
    rows: int
    width: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.rows * self.width * torch.bfloat16.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A drafted chain of which verification rejected at least one token."""

    root: int
    """Index in the sample of the token that the branch follows."""
    tokens: tuple[int, ...]
    accepted_prefix: int
    """Number of accepted nodes; ``tokens[accepted_prefix]`` is the first rejected token."""
    draft_logprobs: tuple[float, ...]
    """[m] log-probability that the serving draft gave each node; NaN where the serving node did not know it, and for
    tokens that only the suffix drafter proposed."""
    teacher: Teacher
    """[m, k] the target's distribution after consuming each node."""
    weight: float = 1.0
    """Factor on the branch's loss, multiplied with the weight of its sample."""
    by_speculator: bool = True
    """Whether the serving draft proposed any of the tokens."""

    @property
    def rejected_prob(self) -> float:
        """Probability that the serving draft gave the first rejected token; 1 where it is unknown."""
        logprob = self.draft_logprobs[self.accepted_prefix]
        return 1.0 if math.isnan(logprob) else math.exp(logprob)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Consecutive committed tokens of one request."""

    request: str
    tokens: Tensor
    """[n] int64."""
    next_token: int | None
    """Token that the target chose after the last one; it has no feature yet."""
    features: Tensor
    """[n, F] bf16: the captured target states after consuming each token; [0, F] while they are in a file, and until
    they are recomputed."""
    known: Tensor
    """[n] bool: whether the target's distribution after consuming the token was recorded."""
    teacher: Teacher
    """[known tokens, k], in order."""
    branches: tuple[Branch, ...] = ()
    preceding: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 tokens of the request before the sample, as far as recomputing its features needs them."""
    weight: float = 1.0
    """Factor on the sample's loss, relative to the other samples of a step."""
    time: float = 0.0
    """Unix time of the sample's record by the clock of its node; 0 where it is unknown."""
    label: str | None = None
    """Traffic label of the request."""
    sampling: RequestSampling | None = None
    """None where it is unknown."""
    prompt_key: str = ""
    """What the held-out set is drawn by: the node's prompt key, or the request's id in rows of older nodes."""
    suffix_predicted: Tensor | None = None
    """[n] bool: whether the suffix drafter predicts the token after this one; None where it was not asked."""
    position: int = 0
    """Position of the first token in the request."""
    own_begin: int = 0
    """First row that is learned from and scored. The rows before it contribute keys and values only."""
    own_end: int | None = None
    """End of the rows that are learned from and scored; None for the last row. The tokens behind it continue chains."""
    stored: StoredFeatures | None = None
    """The file with the features; None where they are in memory, or have to be recomputed."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def own_rows(self) -> range:
        """Rows that are learned from and scored; row t reads feature t and token t + 1."""
        return range(self.own_begin, len(self) if self.own_end is None else self.own_end)

    @property
    def has_features(self) -> bool:
        """Whether the features are in memory, or else in a file or to be recomputed."""
        return len(self.features) == len(self)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features, wherever they are."""
        return len(self) * self.features.shape[-1] * self.features.element_size()

    @property
    def other_bytes(self) -> int:
        """Bytes of all other tensors; ``suffix_predicted`` counts before it is known too."""
        teachers = (self.teacher, *(branch.teacher for branch in self.branches))
        tensors = [self.tokens, self.known, self.preceding, *(t for one in teachers for t in (one.ids, one.logprobs))]
        return sum(tensor.nbytes for tensor in tensors) + len(self) * torch.bool.itemsize

    @property
    def committed(self) -> int:
        """Number of committed tokens, ``next_token`` included."""
        return len(self) + (self.next_token is not None)

    def committed_tokens(self) -> list[int]:
        """Return the committed tokens, ``next_token`` included."""
        return [*self.tokens.tolist(), *([] if self.next_token is None else [self.next_token])]

    def own_output(self) -> list[int]:
        """Return the output tokens that its own rows chose: over the samples of a request, each output token once."""
        known, committed = self.known.tolist(), self.committed_tokens()
        return [committed[row + 1] for row in self.own_rows if known[row] and row + 1 < len(committed)]

    @property
    def output_tokens(self) -> int:
        """Number of output tokens: each was chosen from a known distribution."""
        return int(self.known.sum())


def read_sample(row: Row, rejected: Sequence[Row]) -> Sample:
    """Return the sample of an accepted row with the branches of its rejected rows."""
    return Sample(
        request=row["request"],
        tokens=torch.tensor(row["tokens"], dtype=torch.int64),
        next_token=row["next_token"],
        features=_read_features(row),
        known=torch.tensor(row["loss_mask"], dtype=torch.bool),
        teacher=_read_teacher(row),
        branches=tuple(_read_branch(r, row["position"]) for r in rejected),
        time=row["time"].timestamp(),
        label=row["label"],
        sampling=_read_sampling(row),
        prompt_key=row["prompt_key"] or row["request"],
        position=row["position"],
    )


def own_tensors(sample: Sample) -> Sample:
    """Return the sample with tensors that share no memory with those of other samples, as parts of a request do."""

    def own(tensor: Tensor) -> Tensor:
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    return replace(
        sample,
        tokens=own(sample.tokens),
        features=own(sample.features),
        known=own(sample.known),
        teacher=Teacher(own(sample.teacher.ids), own(sample.teacher.logprobs)),
        preceding=own(sample.preceding),
        suffix_predicted=None if sample.suffix_predicted is None else own(sample.suffix_predicted),
    )


def provides_features(row: Row) -> bool:
    """Return whether an accepted row holds its features, or starts its request so that they can be recomputed."""
    return bool(row["features"]) or row["position"] == 0


def drop_rootless_branches(sample: Sample) -> Sample:
    """Return the sample without the branches whose root, or the token before it, is missing."""
    return replace(sample, branches=tuple(b for b in sample.branches if 0 < b.root < len(sample)))


def continues(chunks: Sequence[Sample], chunk: Sample) -> bool:
    """Return whether no token between consecutive chunks of a request and the next one is missing."""
    last = chunks[-1]
    repeats = chunk.position == chunks[0].position == 0 and len(chunk) > len(last)
    return chunk.position == last.position + len(last) or repeats


def join_samples(chunks: Sequence[Sample]) -> Sample:
    """Join the chunks of one request that follow each other.

    A chunk without features starts with the request each time; its repeated tokens are skipped.

    Args:
        chunks: By position; at least one.

    Raises:
        ValueError: a token between two chunks is missing.
    """
    if len(chunks) == 1:
        return chunks[0]
    first, last, length = chunks[0], chunks[-1], 0
    width = min(chunk.teacher.ids.shape[-1] for chunk in chunks)
    parts: list[Sample] = []
    for chunk in chunks:
        repeated = first.position + length - chunk.position
        if not 0 <= repeated <= len(chunk):
            raise ValueError(f"{chunk.request}: a chunk starts at {chunk.position}, not {first.position + length}")
        known, had_teacher = chunk.known[repeated:], int(chunk.known[:repeated].sum())
        parts.append(
            replace(
                chunk,
                tokens=chunk.tokens[repeated:],
                features=chunk.features[repeated:],
                known=known,
                teacher=chunk.teacher[had_teacher:],
                branches=tuple(replace(b, root=b.root + chunk.position - first.position) for b in chunk.branches),
            )
        )
        length += len(chunk) - repeated
    has_features = all(part.has_features for part in parts)
    return replace(
        last,
        tokens=torch.cat([part.tokens for part in parts]),
        features=torch.cat([part.features for part in parts]) if has_features else first.features[:0],
        known=torch.cat([part.known for part in parts]),
        teacher=Teacher(
            torch.cat([part.teacher.ids[:, :width] for part in parts]),
            torch.cat([part.teacher.logprobs[:, :width] for part in parts]),
        ),
        branches=tuple(branch for part in parts for branch in part.branches),
        position=first.position,
    )


def recompute_features(sample: Sample, compute_states: ComputeStates) -> Sample:
    """Return the sample with features from the frozen target."""
    states = compute_states(torch.cat([sample.preceding, sample.tokens]))
    return replace(sample, features=states[len(sample.preceding) :].clone())


def mark_suffix_predictions(sample: Sample) -> Sample:
    """Return the sample with the output tokens that the suffix drafter predicts from the request's own tokens.

    A node may predict more of them, from earlier answers. These are not replayed: the result depends on the sample
    alone, so that it is the same after a restart.
    """
    before = sample.preceding.tolist()
    committed = before + sample.committed_tokens()
    predicted = torch.zeros(len(sample), dtype=torch.bool)
    history = SequenceHistory()
    for i in sample.known.nonzero().flatten().tolist():
        end = len(before) + i + 1
        likeliest = next(likeliest_chain(history.find(committed[:end], 1).continuations), None)
        predicted[i] = likeliest is not None and committed[end : end + 1] == [likeliest[0]]
    return replace(sample, suffix_predicted=predicted)


def split_sample(sample: Sample, max_tokens: int, context_tokens: int) -> list[Sample]:
    """Cut a sample into parts that each own at most ``max_tokens`` rows; drop rows from which nothing is learned.

    A part also holds up to ``context_tokens`` tokens before its own rows, and ``LOOKAHEAD_TOKENS`` behind them, so that
    every chain of its rows is trained and scored as in the whole sample. A branch goes to the part that owns the row
    before its root.
    """
    if not bool(sample.known.any()):
        return []
    first_known = int(sample.known.nonzero()[0])
    own = range(max(sample.own_rows.start, first_known - LOOKAHEAD_TOKENS), sample.own_rows.stop)
    parts = []
    for start in own[::max_tokens]:
        stop = min(start + max_tokens, own.stop)
        begin, end = max(0, start - context_tokens), min(stop + LOOKAHEAD_TOKENS, len(sample))
        if not bool(sample.known[start + 1 : end].any()):
            continue
        known_before, known_within = int(sample.known[:begin].sum()), int(sample.known[begin:end].sum())
        parts.append(
            replace(
                sample,
                tokens=sample.tokens[begin:end],
                next_token=sample.next_token if end == len(sample) else int(sample.tokens[end]),
                features=sample.features[begin:end],
                known=sample.known[begin:end],
                teacher=sample.teacher[known_before : known_before + known_within],
                branches=tuple(
                    replace(branch, root=branch.root - begin)
                    for branch in sample.branches
                    if start < branch.root <= stop and branch.root < len(sample)
                ),
                preceding=torch.cat([sample.preceding, sample.tokens[:begin]]),
                position=sample.position + begin,
                own_begin=start - begin,
                own_end=stop - begin,
                suffix_predicted=None if sample.suffix_predicted is None else sample.suffix_predicted[begin:end],
            )
        )
    return parts


def _read_features(row: Row) -> Tensor:
    width: int = row["feature_width"]
    if not row["features"]:
        return torch.empty(0, width, dtype=torch.bfloat16)
    return torch.frombuffer(bytearray(row["features"]), dtype=torch.bfloat16).view(-1, width)


def _read_sampling(row: Row) -> RequestSampling | None:
    """Return the sampling of a row; None where an older stream worker wrote it."""
    temperature = row["temperature"]
    return None if temperature is None else RequestSampling(temperature, row["top_p"], row["sampling_top_k"])


def _read_branch(row: Row, position: int) -> Branch:
    logprobs, sources = row["draft_logprobs"], row["draft_sources"]
    by_speculator = [True] * len(logprobs) if sources is None else [bool(s & DraftSource.SPECULATOR) for s in sources]
    return Branch(
        root=row["root_position"] - position,
        tokens=tuple(row["branch"]),
        accepted_prefix=row["accepted_prefix"],
        draft_logprobs=tuple(p if known else math.nan for p, known in zip(logprobs, by_speculator, strict=True)),
        teacher=_read_teacher(row),
        by_speculator=any(by_speculator),
    )


def _read_teacher(row: Row) -> Teacher:
    shape = (-1, row["top_k"])
    return Teacher(
        torch.tensor(row["teacher_ids"], dtype=torch.int64).view(shape),
        torch.tensor(row["teacher_logprobs"], dtype=torch.float32).view(shape),
    )
