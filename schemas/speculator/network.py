"""The EAGLE-3 draft: one decoder layer over (target features, next token), as in arXiv 2503.01840, section 3.

Parameter names are those of the checkpoint that serving engines load. Row t of a sequence takes the target's captured
states after x_t and the embedding of x_{t+1}, and predicts x_{t+2}. The layer's output is the hidden state that the
next drafting step takes in place of target features.

Two variants. In EAGLE-3 that hidden state is the layer's output before ``norm``, which stands before ``lm_head`` alone.
In EAGLE-3.1 (arXiv 2605.09992) it is the output after ``norm``, so that its size cannot drift from step to step, and
each captured layer's states pass a norm of their own before ``fc``, so that layers of large values do not drown others.

Shape suffixes: B sequences, T rows, F feature width, H hidden size, N heads, M key/value heads, E head size, D draft
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.speculator.rotary import Scaling, rotary_angles, rotate

Variant = Literal["eagle3", "eagle3.1"]

_LOUDNESS, _BESIDE = 2.0, 0.3
"""Of a random draft: size of the embeddings that come out of attention, which averages over rows, and factor on the
random weights that let the hidden state into it."""


@dataclass(frozen=True, slots=True)
class DraftShape:
    """Everything that fixes the parameters' shapes and the arithmetic; part of the speculator line."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    capture_layers: tuple[int, ...]
    """Layers whose output is captured, numbered from 0 as SGLang's ``eagle_aux_hidden_state_layer_ids``."""
    variant: Variant = "eagle3"
    rope_scaling: Scaling | None = None

    @property
    def feature_width(self) -> int:
        """F: values that the target gives per token."""
        return self.hidden_size * len(self.capture_layers)

    @property
    def normed(self) -> bool:
        """Whether target states are normed before ``fc``, and the hidden state before it recurs (EAGLE-3.1)."""
        return self.variant == "eagle3.1"


class Projected(NamedTuple):
    """Queries [B, N, T, E], keys and values [B, M, T, E] of a layer's input, rotary position applied."""

    q_BNTE: Tensor
    k_BMTE: Tensor
    v_BMTE: Tensor


class EagleDraft(nn.Module):
    """The draft network. Embeddings are the target's and are passed in; attention is the caller's.

    A caller runs one step as ``project`` → its own attention over its own cache → ``finish`` → ``logits``: serving
    attends over a cache of slots, training over the rows of a window and the steps before.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.shape = shape
        hidden = shape.hidden_size
        if shape.normed:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(hidden, eps=shape.rms_norm_eps) for _ in shape.capture_layers)
        self.fc = nn.Linear(shape.feature_width, hidden, bias=False)
        self.midlayer = _MidLayer(shape)
        self.norm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, shape.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(shape.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(shape.vocab_size, dtype=torch.bool))

    def fuse(self, features_BTF: Tensor) -> Tensor:
        """Hidden states [B, T, H] from captured target states [B, T, F] (low, middle, high)."""
        if self.shape.normed:
            layers = features_BTF.chunk(len(self.fc_norm), dim=-1)
            features_BTF = torch.cat([norm(x) for norm, x in zip(self.fc_norm, layers, strict=True)], dim=-1)
        fused: Tensor = self.fc(features_BTF)
        return fused

    def project(self, embeddings_BTH: Tensor, hidden_BTH: Tensor, positions_BT: Tensor) -> Projected:
        """Queries, keys and values of the rows at their rotary positions."""
        layer, shape = self.midlayer, self.shape
        x_BT2H = torch.cat([layer.input_layernorm(embeddings_BTH), layer.hidden_norm(hidden_BTH)], dim=-1)
        q, k, v = (
            p(x_BT2H).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        cos, sin = rotary_angles(positions_BT, shape.head_dim, shape.rope_theta, shape.rope_scaling)
        return Projected(rotate(q, cos, sin), rotate(k, cos, sin), v)

    def finish(self, hidden_BTH: Tensor, attended_BNTE: Tensor) -> Tensor:
        """The hidden state that the next step takes, and ``logits`` [B, T, H]: residual, attention, MLP."""
        layer = self.midlayer
        residual = hidden_BTH + layer.self_attn.o_proj(attended_BNTE.transpose(1, 2).flatten(2))
        out: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return self.norm(out) if self.shape.normed else out

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Scores [B, T, D] over the draft vocabulary, of what ``finish`` gave."""
        scores: Tensor = self.lm_head(hidden_BTH if self.shape.normed else self.norm(hidden_BTH))
        return scores

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Target token ids of draft-vocabulary ids, any shape."""
        return draft_ids + self.d2t[draft_ids]


class _MidLayer(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        hidden, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.hidden_norm = nn.RMSNorm(hidden, eps=eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.mlp = _Mlp(hidden, shape.intermediate_size)


class _Attention(nn.Module):
    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        hidden, size = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(2 * hidden, shape.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(2 * hidden, shape.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(2 * hidden, shape.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * size, hidden, bias=False)


class _Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def random_draft(shape: DraftShape, seed: int, kept_D: Tensor | None = None) -> EagleDraft:
    """A draft that has learned nothing: normal weights of deviation 0.02, norms one, the next token let through.

    Args:
        shape: Of the draft.
        seed: Of the weights.
        kept_D: Target ids that it can propose, ascending; the lowest ones where none are given.
    """
    draft = EagleDraft(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        _let_next_token_through(draft)
        lowest_D = torch.arange(shape.draft_vocab_size)
        kept_D = lowest_D if kept_D is None else kept_D
        draft.d2t.copy_(kept_D - lowest_D)
        draft.t2d[kept_D] = True
    return draft


def _let_next_token_through(draft: EagleDraft) -> None:
    """Let embeddings come out of attention as they went in, as far as its values are wide enough.

    A row's residual is the hidden state: of its next token, the newest that it knows, it is told by attention alone,
    and random values and outputs would first have to learn to tell it. Where values are narrower than an embedding,
    M * E < H, they carry evenly spaced parts of it. No kernel of a machine decides a digit: all processes begin alike.
    """
    shape, attention = draft.shape, draft.midlayer.self_attn
    hidden, width = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
    sharing = shape.num_attention_heads // shape.num_key_value_heads
    value = torch.arange(width)
    through_VH = torch.eye(hidden)[value * hidden // width if width < hidden else value % hidden]
    attention.v_proj.weight[:, :hidden].copy_(through_VH)
    attention.v_proj.weight[:, hidden:].mul_(_BESIDE)
    back_HV = through_VH.T / (sharing * through_VH.sum(0).clamp(min=1)[:, None])
    back_HME = back_HV.view(hidden, -1, shape.head_dim).repeat_interleave(sharing, dim=1)
    attention.o_proj.weight.copy_(_LOUDNESS * back_HME.flatten(1))
