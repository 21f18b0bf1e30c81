"""What ``aurora bench trainer`` trains on: numbers in the form of recorded traces, for drafts of SmolLM2-135M.

What a step takes depends on shapes alone, so the states are random. The target's distributions are peaked, as real ones
are, and lie within the draft vocabulary, so that every position is learned from.

Shapes: S sequences of n tokens, H hidden size, F feature width, V and D target and draft vocabulary, k teacher width, m
nodes of a tree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops.bench.trainer_worker import CONFIG, LAST_RMS, WEIGHTS, Tensors
from schemas.draft_tree import rejected_branches
from schemas.speculator.network import DraftShape, random_draft
from schemas.trace.record import ROOT
from trainer.data.samples import Branch, Teacher, Window

SMOLLM2 = DraftShape(
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    draft_vocab_size=8192,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    max_position_embeddings=8192,
    capture_layers=(1, 14, 26),
)
TOP_K = 8
TREE = (ROOT, ROOT, ROOT, ROOT, 0, 0, 1, 1, 2, 4, 4, 5, 6, 9, 9, 10)
"""Parents of a drafted tree: 16 nodes, 4 deep."""
ACCEPTED = ((), (0,), (0, 4))
"""Nodes of the tree that were kept, verify step by verify step."""
_SERVED_LOGPROB = -1.0
"""What the draft that served gave each node: enough for every branch to be learned from."""


@dataclass(frozen=True, slots=True)
class Request:
    """Layout of a request whose every verify step drafted a tree."""

    prompt: int
    answer: int
    every: int
    """Tokens from one verify step to the next."""

    @property
    def roots(self) -> range:
        """Where the trees stand."""
        return range(self.prompt, self.prompt + self.answer - len(ACCEPTED), self.every)


def shape_of(config: Mapping[str, Any]) -> DraftShape:
    """The shape in a configuration that ``write`` wrote."""
    names = DraftShape.__dataclass_fields__
    values = {name: config[name] for name in names if name != "capture_layers"}
    return DraftShape(**values, capture_layers=tuple(config["capture_layers"]))


def write(folder: Path, shape: DraftShape, lengths: Sequence[int], tokens: int, seed: int) -> None:
    """The weights that every trainer begins with, and for each length as many sequences as make up so many tokens."""
    weights = random_draft(shape, seed).state_dict()
    embeddings = embeddings_of(shape, seed)
    torch.save({**weights, "embed_tokens.weight": embeddings}, folder / WEIGHTS)
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta}, "pad_token_id": None}
    config = {**asdict(shape), **fixed, **rope, "num_hidden_layers": 1, "target_hidden_size": shape.hidden_size}
    (folder / CONFIG).write_text(json.dumps(config))
    for length in lengths:
        torch.save(sequences(shape, max(tokens // length, 1), length, seed + length), folder / case(length))


def case(length: int) -> str:
    """Name of the file of that length."""
    return f"{length}.pt"


def embeddings_of(shape: DraftShape, seed: int) -> Tensor:
    """Token embeddings [V, H] of the target, and its head; those outside the draft vocabulary are never likely."""
    generator = torch.Generator().manual_seed(seed)
    embeddings_VH = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * 0.02
    embeddings_VH[shape.draft_vocab_size :] *= 0.01
    return embeddings_VH


def sequences(shape: DraftShape, number: int, length: int, seed: int) -> Tensors:
    """``tokens`` [S, n], ``features`` [S, n, F] as traces hold them, and the target's ``last`` states [S, n, H]."""
    generator = torch.Generator().manual_seed(seed)
    last_SnH = torch.randn(number, length, shape.hidden_size, generator=generator)
    rms_Sn1 = last_SnH.square().mean(dim=-1, keepdim=True).sqrt()
    return {
        "tokens": torch.randint(shape.draft_vocab_size, (number, length), generator=generator),
        "features": torch.randn(number, length, shape.feature_width, generator=generator).bfloat16(),
        "last": last_SnH / rms_Sn1 * LAST_RMS,
    }


def window(tokens: Tensor, features: Tensor, last_nH: Tensor, head_DH: Tensor) -> Window:
    """The window of a sequence: its teacher is the likeliest tokens, as traces hold it."""
    top = (last_nH @ head_DH.T).log_softmax(dim=-1).topk(TOP_K)
    known = torch.ones(len(tokens), dtype=torch.bool)
    return Window("request", tokens, None, features, known, Teacher(top.indices, top.values))


def drafted_window(shape: DraftShape, layout: Request, seed: int) -> Window:
    """A request with a tree at the root of every verify step, of whose nodes some were kept."""
    generator = torch.Generator().manual_seed(seed)
    length = layout.prompt + layout.answer
    tokens = torch.randint(shape.draft_vocab_size, (length,), generator=generator)
    known = torch.arange(length) >= layout.prompt - 1
    return Window(
        request=f"request-{seed}",
        tokens=tokens,
        next_token=None,
        features=torch.randn(length, shape.feature_width, generator=generator).bfloat16(),
        known=known,
        teacher=_teacher(shape, int(known.sum()), generator),
        branches=tuple(
            branch
            for number, root in enumerate(layout.roots)
            for branch in _branches(shape, tokens, root, ACCEPTED[number % len(ACCEPTED)], generator)
        ),
    )


def branch_by_branch(whole: Window) -> list[Window]:
    """The same work without sharing: the request alone, and each branch behind a copy of all that comes before it."""
    nothing = torch.zeros(0, whole.teacher.ids.shape[-1])
    return [
        replace(whole, branches=()),
        *(
            replace(
                whole,
                tokens=whole.tokens[: branch.root + 1],
                features=whole.features[: branch.root + 1],
                known=torch.zeros(branch.root + 1, dtype=torch.bool),
                teacher=Teacher(nothing.long(), nothing),
                branches=(branch,),
            )
            for branch in whole.branches
        ),
    ]


def as_chains(whole: Window, shape: DraftShape) -> Window:
    """The same branches sharing nothing but the window: no two of them begin with the same token."""
    followed = {branch.root: int(whole.tokens[branch.root + 1]) for branch in whole.branches}
    apart = []
    for number, branch in enumerate(whole.branches):
        first = (followed[branch.root] + 1 + number) % shape.draft_vocab_size
        apart.append(replace(branch, tokens=(first, *branch.tokens[1:])))
    return replace(whole, branches=tuple(apart))


def _branches(
    shape: DraftShape, tokens: Tensor, root: int, accepted: tuple[int, ...], generator: torch.Generator
) -> Iterator[Branch]:
    """The paths of one tree that were not kept to their ends."""
    kept = dict(zip(accepted, tokens[root + 1 :].tolist(), strict=False))
    first = int(torch.randint(shape.draft_vocab_size, (), generator=generator))
    token = [kept.get(node, (first + node) % shape.draft_vocab_size) for node in range(len(TREE))]
    teacher = _teacher(shape, len(TREE), generator)
    for path in rejected_branches(TREE, accepted):
        yield Branch(
            root=root,
            tokens=tuple(token[node] for node in path),
            accepted_prefix=sum(node in accepted for node in path),
            draft_logprobs=(_SERVED_LOGPROB,) * len(path),
            teacher=teacher[torch.tensor(path)],
        )


def _teacher(shape: DraftShape, rows: int, generator: torch.Generator) -> Teacher:
    ids = torch.randint(shape.draft_vocab_size - TOP_K, (rows, 1), generator=generator) + torch.arange(TOP_K)
    return Teacher(ids, torch.randn(rows, TOP_K, generator=generator).log_softmax(dim=-1))
