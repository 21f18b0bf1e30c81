"""Training data of ``aurora bench trainer``: random numbers in the form of recorded traces, for SmolLM2-135M.

The cost of a step depends on shapes alone, so the states are random. The target's distributions are peaked, as real
ones are, and lie within the draft vocabulary, so that every position has a teacher.

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

from ops.bench.trainer.peer_worker import CONFIG, LAST_RMS, WEIGHTS, Tensors
from schemas.draft_tree import rejected_branches
from schemas.speculator.network import DraftShape, EagleDraft, random_draft
from schemas.trace.record import ROOT
from trainer.data.samples import Branch, Sample, Teacher

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
"""Parents of a draft tree: 16 nodes, 4 deep."""
ACCEPTED = ((), (0,), (0, 4))
"""Accepted nodes of the tree, in turn from verify step to verify step."""
_SERVED_LOGPROB = -1.0
"""Log-probability of each node under the draft that served: enough for every branch to be trained on."""


@dataclass(frozen=True, slots=True)
class TreeRequest:
    """Layout of a request with a draft tree in every verify step."""

    prompt: int
    output: int
    every: int
    """Tokens from one verify step to the next."""

    @property
    def roots(self) -> range:
        """Positions of the trees."""
        return range(self.prompt, self.prompt + self.output - len(ACCEPTED), self.every)


def read_shape(config: Mapping[str, Any]) -> DraftShape:
    """Return the shape in a configuration that ``write_data`` wrote."""
    names = DraftShape.__dataclass_fields__
    values = {name: config[name] for name in names if name != "capture_layers"}
    return DraftShape(**values, capture_layers=tuple(config["capture_layers"]))


def write_data(folder: Path, shape: DraftShape, lengths: Sequence[int], tokens: int, seed: int) -> None:
    """Write the initial weights of every trainer, and for each length sequences of ``tokens`` tokens in total."""
    write_weights(folder, random_draft(shape, seed), random_embeddings(shape, seed))
    for length in lengths:
        sequences = random_sequences(shape, max(tokens // length, 1), length, seed + length)
        torch.save(sequences, folder / case_file(length))


def write_weights(folder: Path, draft: EagleDraft, embeddings_VH: Tensor) -> None:
    """Write a draft with the target's embeddings, and its configuration, as every trainer reads them."""
    shape = draft.shape
    torch.save({**draft.state_dict(), "embed_tokens.weight": embeddings_VH}, folder / WEIGHTS)
    fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta}, "pad_token_id": None}
    config = {**asdict(shape), **fixed, **rope, "num_hidden_layers": 1, "target_hidden_size": shape.hidden_size}
    (folder / CONFIG).write_text(json.dumps(config))


def case_file(length: int) -> str:
    """Return the name of the file with sequences of that length."""
    return f"{length}.pt"


def random_embeddings(shape: DraftShape, seed: int) -> Tensor:
    """Return token embeddings [V, H] of the target, also its head; tokens outside the draft vocabulary are unlikely."""
    generator = torch.Generator().manual_seed(seed)
    embeddings_VH = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * 0.02
    embeddings_VH[shape.draft_vocab_size :] *= 0.01
    return embeddings_VH


def random_sequences(shape: DraftShape, number: int, length: int, seed: int) -> Tensors:
    """Return ``tokens`` [S, n], ``features`` [S, n, F] as in traces, and the target's ``last`` states [S, n, H]."""
    generator = torch.Generator().manual_seed(seed)
    last_SnH = torch.randn(number, length, shape.hidden_size, generator=generator)
    rms_Sn1 = last_SnH.square().mean(dim=-1, keepdim=True).sqrt()
    return {
        "tokens": torch.randint(shape.draft_vocab_size, (number, length), generator=generator),
        "features": torch.randn(number, length, shape.feature_width, generator=generator).bfloat16(),
        "last": last_SnH / rms_Sn1 * LAST_RMS,
    }


def build_sample(tokens: Tensor, features: Tensor, last_nH: Tensor, head: Tensor, top_k: int = TOP_K) -> Sample:
    """Return the sample of a sequence; its teacher is the likeliest tokens, as in traces.

    Args:
        tokens: [n].
        features: [n, F].
        last_nH: The target's last states.
        head: Its output layer over the tokens that may be likely, [.., H].
        top_k: Number of tokens that a trace records.
    """
    top = (last_nH @ head.T).log_softmax(dim=-1).topk(top_k)
    known = torch.ones(len(tokens), dtype=torch.bool)
    return Sample("request", tokens, None, features, known, Teacher(top.indices, top.values))


def build_tree_sample(shape: DraftShape, layout: TreeRequest, seed: int) -> Sample:
    """Return a request with a draft tree at every root, of which some nodes were accepted."""
    generator = torch.Generator().manual_seed(seed)
    length = layout.prompt + layout.output
    tokens = torch.randint(shape.draft_vocab_size, (length,), generator=generator)
    known = torch.arange(length) >= layout.prompt - 1
    return Sample(
        request=f"request-{seed}",
        tokens=tokens,
        next_token=None,
        features=torch.randn(length, shape.feature_width, generator=generator).bfloat16(),
        known=known,
        teacher=_random_teacher(shape, int(known.sum()), generator),
        branches=tuple(
            branch
            for number, root in enumerate(layout.roots)
            for branch in _branches(shape, tokens, root, ACCEPTED[number % len(ACCEPTED)], generator)
        ),
    )


def split_branches(whole: Sample) -> list[Sample]:
    """Return the same work without sharing: the request alone, and each branch behind a copy of its prefix."""
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


def separate_chains(whole: Sample, shape: DraftShape) -> Sample:
    """Return the same branches, sharing only the sample: no two of them begin with the same token."""
    following = {branch.root: int(whole.tokens[branch.root + 1]) for branch in whole.branches}
    chains = []
    for number, branch in enumerate(whole.branches):
        first = (following[branch.root] + 1 + number) % shape.draft_vocab_size
        chains.append(replace(branch, tokens=(first, *branch.tokens[1:])))
    return replace(whole, branches=tuple(chains))


def _branches(
    shape: DraftShape, tokens: Tensor, root: int, accepted: tuple[int, ...], generator: torch.Generator
) -> Iterator[Branch]:
    """Yield the rejected branches of one tree."""
    committed = dict(zip(accepted, tokens[root + 1 :].tolist(), strict=False))
    first = int(torch.randint(shape.draft_vocab_size, (), generator=generator))
    token = [committed.get(node, (first + node) % shape.draft_vocab_size) for node in range(len(TREE))]
    teacher = _random_teacher(shape, len(TREE), generator)
    for path in rejected_branches(TREE, accepted):
        yield Branch(
            root=root,
            tokens=tuple(token[node] for node in path),
            accepted_prefix=sum(node in accepted for node in path),
            draft_logprobs=(_SERVED_LOGPROB,) * len(path),
            teacher=teacher[torch.tensor(path)],
        )


def _random_teacher(shape: DraftShape, rows: int, generator: torch.Generator) -> Teacher:
    ids = torch.randint(shape.draft_vocab_size - TOP_K, (rows, 1), generator=generator) + torch.arange(TOP_K)
    return Teacher(ids, torch.randn(rows, TOP_K, generator=generator).log_softmax(dim=-1))
