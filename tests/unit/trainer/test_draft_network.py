"""The draft network in every variant, as served and as trained, against its definition written row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from schemas.speculator.network import DraftShape, EagleDraft, Variant, random_draft
from serving.engines.builtin.eagle_drafter import EagleDrafter, synthetic_sequence
from serving.planner.acceptance_model import AcceptanceModel
from serving.planner.planner import DraftBudget
from trainer.objective.training_time_test import DraftUnroll

HIDDEN, HEADS, KV_HEADS, SIZE, EPS, THETA = 16, 4, 2, 4, 1e-5, 100.0
TOKENS = [3, 1, 4, 1, 5, 9, 2]
"""The last token is the root of the verify step."""
STEPS = 4


def shaped(variant: Variant) -> DraftShape:
    return DraftShape(HIDDEN, 24, HEADS, KV_HEADS, SIZE, 32, 20, EPS, THETA, 64, (1, 2, 3), variant)


SHAPES = {
    "eagle3": shaped("eagle3"),
    "eagle3.1": shaped("eagle3.1"),
    "eagle3 norm_before_residual": replace(shaped("eagle3"), norm_before_residual=True),
    "eagle3.1 norm_before_residual": replace(shaped("eagle3.1"), norm_before_residual=True),
}


def lively(kind: str) -> EagleDraft:
    """A draft whose every weight matters, norms included: a missing one would show."""
    draft = random_draft(SHAPES[kind], seed=2)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 2.0, generator=generator)
            else:
                parameter.normal_(0.0, 0.24, generator=generator)
    kept = torch.arange(20) + (torch.arange(20) > 6) * 5
    draft.d2t.copy_(kept - torch.arange(20))
    draft.t2d.zero_()
    draft.t2d[kept] = True
    return draft


def embeddings_VH() -> Tensor:
    return torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(9))


def features_TF() -> Tensor:
    """Layers of very different magnitude, as in real targets."""
    values = torch.randn(len(TOKENS) - 1, 3, HIDDEN, generator=torch.Generator().manual_seed(8))
    return (values * torch.tensor([0.3, 1.0, 6.0])[:, None]).flatten(1)


class Plain:
    """The definition of EAGLE-3 and 3.1 over plain tensors: one row and one head at a time."""

    def __init__(self, draft: EagleDraft) -> None:
        self._w = dict(draft.state_dict())
        self._normed = draft.shape.variant == "eagle3.1"
        self._adds_normed = draft.shape.norm_before_residual
        self._keys: list[list[Tensor]] = []
        self._values: list[list[Tensor]] = []

    def fuse(self, features_F: Tensor) -> Tensor:
        parts = [features_F[i * HIDDEN : (i + 1) * HIDDEN] for i in range(3)]
        if self._normed:
            parts = [self._rms(x, f"fc_norm.{i}") for i, x in enumerate(parts)]
        return self._w["fc.weight"] @ torch.cat(parts)

    def step(self, token: int, hidden_H: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return the recurrent hidden state, and log-probabilities over the draft vocabulary."""
        layer = "midlayer"
        x = torch.cat(
            [
                self._rms(embeddings_VH()[token], f"{layer}.input_layernorm"),
                self._rms(hidden_H, f"{layer}.hidden_norm"),
            ]
        )
        q, k, v = (self._w[f"{layer}.self_attn.{name}_proj.weight"] @ x for name in "qkv")
        self._keys.append([self._turn(k[h * SIZE : (h + 1) * SIZE], position) for h in range(KV_HEADS)])
        self._values.append([v[h * SIZE : (h + 1) * SIZE] for h in range(KV_HEADS)])
        heads = []
        for head in range(HEADS):
            of = head // (HEADS // KV_HEADS)
            turned = self._turn(q[head * SIZE : (head + 1) * SIZE], position)
            weights = torch.stack([turned @ keys[of] / math.sqrt(SIZE) for keys in self._keys]).softmax(0)
            heads.append(sum(w * values[of] for w, values in zip(weights, self._values, strict=True)))
        base_H = self._rms(hidden_H, f"{layer}.hidden_norm") if self._adds_normed else hidden_H
        residual = base_H + self._w[f"{layer}.self_attn.o_proj.weight"] @ torch.cat(heads)
        x = self._rms(residual, f"{layer}.post_attention_layernorm")
        gate, up, down = (self._w[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        out = residual + down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
        normed = self._rms(out, "norm")
        return (normed if self._normed else out), (self._w["lm_head.weight"] @ normed).log_softmax(0)

    def _rms(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + EPS).sqrt() * self._w[f"{name}.weight"]

    @staticmethod
    def _turn(x_E: Tensor, position: int) -> Tensor:
        out = x_E.clone()
        for i in range(SIZE // 2):
            angle = position * THETA ** (-2 * i / SIZE)
            a, b = x_E[i], x_E[i + SIZE // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + SIZE // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out


def plain_chain(draft: EagleDraft) -> list[tuple[int, float, Tensor]]:
    """Return token, log-probability and hidden state for each step of a greedy chain."""
    plain = Plain(draft)
    for row, features_F in enumerate(features_TF()):
        hidden, logprobs = plain.step(TOKENS[row + 1], plain.fuse(features_F), row)
    chain = []
    for position in range(len(TOKENS) - 1, len(TOKENS) - 1 + STEPS):
        best = int(logprobs.argmax())
        token = best + int(draft.d2t[best])
        chain.append((token, float(logprobs[best]), hidden))
        hidden, logprobs = plain.step(token, hidden, position)
    return chain


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_a_served_chain_equals_the_definition(kind: str) -> None:
    draft = lively(kind)
    drafter = EagleDrafter(draft, "1", embeddings_VH(), slots=1, positions=32, weight_dtype="float32")
    sequence = synthetic_sequence(list(TOKENS), features_TF(), room=21)
    trees, _ = drafter.draft([sequence], DraftBudget(STEPS), {True: AcceptanceModel()})
    wanted = plain_chain(draft)
    assert trees[0].tokens == [token for token, _, _ in wanted]
    assert [node.logprob for node in trees[0].nodes] == pytest.approx([p for _, p, _ in wanted], abs=1e-4)


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_a_trained_chain_equals_the_definition(kind: str) -> None:
    draft = lively(kind)
    features_BTF = torch.cat([features_TF(), torch.zeros(1, draft.shape.feature_width)])[None]
    row = torch.tensor([len(TOKENS) - 2])
    unroll = DraftUnroll(draft, embeddings_VH(), torch.tensor([TOKENS]), features_BTF)
    hidden_AH = unroll.first(row * 0, row)
    for token, logprob, wanted_H in plain_chain(draft):
        torch.testing.assert_close(hidden_AH[0], wanted_H, rtol=1e-4, atol=1e-4)
        scores = draft.logits(hidden_AH)[0].log_softmax(-1)
        assert int(draft.to_target_ids(scores.argmax())) == token
        assert float(scores.max()) == pytest.approx(logprob, abs=1e-4)
        hidden_AH = unroll.advance(torch.tensor([0]), torch.tensor([token]))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [3, 4, 8])
@torch.no_grad()
def test_attention_of_a_random_draft_returns_the_embedding_up_to_the_width_of_its_values(
    kv_heads: int, size: int
) -> None:
    draft = random_draft(replace(shaped("eagle3.1"), num_key_value_heads=kv_heads, head_dim=size), seed=2)
    attention, hidden_H = draft.midlayer.self_attn, torch.zeros(HIDDEN)
    embedding_H = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
    values = (attention.v_proj.weight @ torch.cat([embedding_H, hidden_H])).view(kv_heads, size)
    out_H = attention.o_proj.weight @ values.repeat_interleave(HEADS // kv_heads, dim=0).flatten()
    given = out_H != 0
    assert given.sum() == min(kv_heads * size, HIDDEN)
    assert torch.allclose(out_H[given], 2 * embedding_H[given])
