"""The EAGLE-3 draft: one decoder layer over (target features, next token), as in arXiv 2503.01840, section 3.

Parameter names are those of the checkpoint that serving engines load. Row t of a sequence takes the target's captured
hidden states after x_t and the embedding of x_{t+1}, and predicts x_{t+2}. The layer's output is a hidden state, which
replaces the target's features in the next drafting step.

There are two variants. In EAGLE-3 that hidden state is the layer's output before ``norm``, and ``norm`` precedes only
``lm_head``. In EAGLE-3.1 (arXiv 2605.09992) it is the output after ``norm``, so that its magnitude cannot drift from
step to step. EAGLE-3.1 also normalizes each captured layer before ``fc``, so that layers with large values do not
dominate.

A draft with ``norm_before_residual``, as speculators trains them, adds attention's output to the normalized hidden
state instead of to the hidden state itself.

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

_EMBEDDING_SCALE, _HIDDEN_FACTOR = 2.0, 0.3
"""Initial weights of attention in a random draft: scale of the embeddings in its output, which averages over rows, and
factor on the random weights of its hidden-state input."""


@dataclass(frozen=True, slots=True)
class DraftShape:
    """All that determines the parameters' shapes and the arithmetic; part of the speculator line."""

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
    """Layers whose output is captured, numbered from 0 like SGLang's ``eagle_aux_hidden_state_layer_ids``."""
    variant: Variant = "eagle3"
    rope_scaling: Scaling | None = None
    norm_before_residual: bool = False

    @property
    def feature_width(self) -> int:
        """F: feature values per token."""
        return self.hidden_size * len(self.capture_layers)

    @property
    def is_normed(self) -> bool:
        """Whether the hidden states are normalized before ``fc`` and before the next step (EAGLE-3.1)."""
        return self.variant == "eagle3.1"


class Projected(NamedTuple):
    """Queries [B, N, T, E], keys and values [B, M, T, E] of a layer's input, with rotary positions applied."""

    q_BNTE: Tensor
    k_BMTE: Tensor
    v_BMTE: Tensor


class EagleDraft(nn.Module):
    """The draft network without attention, which the caller computes, and without embeddings, which are the target's.

    A caller runs one step as ``project`` → attention over its own cache → ``finish`` → ``logits``: serving attends over
    a cache of slots, training over the rows of a sample and the preceding TTT steps.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.shape = shape
        hidden = shape.hidden_size
        if shape.is_normed:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(hidden, eps=shape.rms_norm_eps) for _ in shape.capture_layers)
        self.fc = nn.Linear(shape.feature_width, hidden, bias=False)
        self.midlayer = _MidLayer(shape)
        self.norm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, shape.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(shape.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(shape.vocab_size, dtype=torch.bool))

    def fuse(self, features_BTF: Tensor) -> Tensor:
        """Return hidden states [B, T, H] from the target's features [B, T, F] (low, middle and high layer)."""
        if self.shape.is_normed:
            layers = features_BTF.chunk(len(self.fc_norm), dim=-1)
            features_BTF = torch.cat([norm(x) for norm, x in zip(self.fc_norm, layers, strict=True)], dim=-1)
        fused: Tensor = self.fc(features_BTF)
        return fused

    def project(self, embeddings_BTH: Tensor, hidden_BTH: Tensor, positions_BT: Tensor) -> Projected:
        """Return queries, keys and values of the rows at their rotary positions."""
        layer, shape = self.midlayer, self.shape
        x_BT2H = torch.cat([layer.input_layernorm(embeddings_BTH), layer.hidden_norm(hidden_BTH)], dim=-1)
        q, k, v = (
            p(x_BT2H).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
            for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        cos, sin = rotary_angles(positions_BT, shape.head_dim, shape.rope_theta, shape.rope_scaling)
        return Projected(rotate(q, cos, sin), rotate(k, cos, sin), v)

    def finish(self, hidden_BTH: Tensor, attended_BNTE: Tensor) -> Tensor:
        """Return the hidden states [B, T, H] for ``logits`` and for the next step: residual, attention, MLP."""
        layer = self.midlayer
        if self.shape.norm_before_residual:
            hidden_BTH = layer.hidden_norm(hidden_BTH)
        residual = hidden_BTH + layer.self_attn.o_proj(attended_BNTE.transpose(1, 2).flatten(2))
        out: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return self.norm(out) if self.shape.is_normed else out

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Return logits [B, T, D] over the draft vocabulary from the output of ``finish``."""
        scores: Tensor = self.lm_head(hidden_BTH if self.shape.is_normed else self.norm(hidden_BTH))
        return scores

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        """Return the target token ids of draft-vocabulary ids of any shape."""
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
    """Return an untrained draft that passes the next token's embedding through attention.

    Other weights are normal with standard deviation 0.02, and norms are 1.

    Args:
        shape: Shape of the draft.
        seed: Seed of the weights.
        kept_D: Target token ids of the draft vocabulary, ascending; None uses the lowest ids.
    """
    draft = EagleDraft(shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        _pass_embeddings_through(draft)
        lowest_D = torch.arange(shape.draft_vocab_size)
        kept_D = lowest_D if kept_D is None else kept_D
        draft.d2t.copy_(kept_D - lowest_D)
        draft.t2d[kept_D] = True
    return draft


def _pass_embeddings_through(draft: EagleDraft) -> None:
    """Initialize attention so that it passes the embeddings through, as far as its values are wide enough.

    A row's residual is the hidden state, so the row receives its next token, the newest that it knows, through
    attention only; random value and output weights would have to learn that first. If the values are narrower than an
    embedding, M * E < H, they carry evenly spaced parts of it. The result depends on no machine's kernels, so that all
    processes start from equal weights.
    """
    shape, attention = draft.shape, draft.midlayer.self_attn
    hidden, width = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
    sharing = shape.num_attention_heads // shape.num_key_value_heads
    value = torch.arange(width)
    value_VH = torch.eye(hidden)[value * hidden // width if width < hidden else value % hidden]
    attention.v_proj.weight[:, :hidden].copy_(value_VH)
    attention.v_proj.weight[:, hidden:].mul_(_HIDDEN_FACTOR)
    output_HV = value_VH.T / (sharing * value_VH.sum(0).clamp(min=1)[:, None])
    output_HME = output_HV.view(hidden, -1, shape.head_dim).repeat_interleave(sharing, dim=1)
    attention.o_proj.weight.copy_(_EMBEDDING_SCALE * output_HME.flatten(1))
