"""The draft network with packed weights, for draft steps of few rows.

It computes what ``EagleDraft`` computes, in as few operations as possible: on a CPU a draft step of a small target
spends as long in small operations as in its weights.

- Queries and keys are one product, and so are gate and up.
- A norm whose output feeds only a matrix has its gain in the matrix.
- Rotary angles are read from a table. The outputs of the query and key projections are reordered so that the two
  numbers that a rotation mixes are neighbours: a rotation is then one complex product. The order does not change the
  products of queries and keys.

On a CPU most weights are int8, half the bytes of fp16: rounding changes the proposals but never the output
(docs/benchmarks/results.md). Two matrices are too uneven for 8 bits and stay fp16: ``fc``, whose inputs have outliers,
and the values, which begin as the embeddings passed through, so that one weight of each output dwarfs the others. All
are fp16 on a GPU, and on a CPU without instructions for 8-bit products (VNNI), where inputs have 7 bits.

Shape suffixes as in ``schemas.speculator.network``; P positions, e = E / 2 rotations, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.speculator.network import DraftShape, EagleDraft
from schemas.speculator.rotary import rotary_angles
from serving.engines.builtin.kernels import PackedInt8, RmsNorm, UnitNorm, WeightDtype, has_fbgemm, pack_linear


class PackedDraft(nn.Module):
    """A copy of a draft with the device's fastest kernels.

    Args:
        draft: The network, on a CPU.
        positions: P, maximum number of rotary positions.
        device: Device to compute on.
        dtype: Weight dtype; None chooses the fastest.
    """

    target_ids_D: Tensor
    """[D] target token of each token of the draft vocabulary."""
    _rotations_Pe: Tensor

    def __init__(
        self, draft: EagleDraft, positions: int, device: torch.device, dtype: WeightDtype | None = None
    ) -> None:
        super().__init__()
        shape, layer = draft.shape, draft.midlayer
        attention, mlp = layer.self_attn, layer.mlp
        dtype = dtype or fastest_dtype(device)

        def pack(weight_OI: Tensor, *gains: Tensor) -> nn.Module:
            weight_OI = _with_gains(weight_OI, gains).to(device)
            return _SharedScaleInt8(weight_OI, None) if dtype == "int8" else pack_linear(dtype, weight_OI)

        self.shape = shape
        with torch.no_grad():
            fc_gains = [norm.get_parameter("weight") for norm in draft.fc_norm] if shape.is_normed else []
            uneven: WeightDtype = "float16" if dtype == "int8" else dtype
            self._fc = pack_linear(uneven, _with_gains(draft.fc.weight, fc_gains).to(device))
            queries, keys = (_pair(p.weight, shape.head_dim) for p in (attention.q_proj, attention.k_proj))
            input_gains = layer.input_layernorm.weight, layer.hidden_norm.weight
            self._queries_keys = pack(torch.cat([queries, keys]), *input_gains)
            self._values = pack_linear(uneven, _with_gains(attention.v_proj.weight, input_gains).to(device))
            self._out = pack(attention.o_proj.weight)
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            self._gate_up = pack(gate_up, layer.post_attention_layernorm.weight)
            self._down = pack(mlp.down_proj.weight)
            self._lm_head = pack(draft.lm_head.weight, *([] if shape.is_normed else [draft.norm.weight]))
        self._unit = UnitNorm(shape.hidden_size, shape.rms_norm_eps).to(device)
        self._norm = RmsNorm(draft.norm.weight, shape.rms_norm_eps).to(device)
        self._hidden_norm = RmsNorm(layer.hidden_norm.weight, shape.rms_norm_eps).to(device)
        target_ids_D = draft.to_target_ids(torch.arange(shape.draft_vocab_size))
        self.register_buffer("target_ids_D", target_ids_D.to(device))
        self.register_buffer("_rotations_Pe", _rotations(shape, positions).to(device), persistent=False)

    def fuse(self, features_TF: Tensor) -> Tensor:
        """Return hidden states [T, H] from the target's features."""
        if self.shape.is_normed:
            features_TF = self._unit(features_TF.view(len(features_TF), -1, self.shape.hidden_size)).flatten(1)
        fused: Tensor = self._fc(features_TF)
        return fused

    def project(self, embeddings_TH: Tensor, hidden_TH: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [T, N, E], keys and values [T, M, E] of the rows at their rotary positions."""
        shape = self.shape
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        x_TX = self._unit(torch.stack([embeddings_TH, hidden_TH], dim=1)).flatten(1)
        qk_TGE = self._queries_keys(x_TX).view(len(hidden_TH), heads + kv_heads, shape.head_dim)
        v_TME = self._values(x_TX).view(len(hidden_TH), kv_heads, shape.head_dim)
        pairs_TGe = torch.view_as_complex(qk_TGE.unflatten(-1, (-1, 2)))
        rotated_TGe = pairs_TGe * self._rotations_Pe.index_select(0, positions_T)[:, None]
        qk_TGE = torch.view_as_real(rotated_TGe).flatten(-2)
        return qk_TGE[:, :heads], qk_TGE[:, heads:], v_TME

    def finish(self, hidden_TH: Tensor, attended_TNE: Tensor) -> Tensor:
        """Return the hidden states [T, H] for ``logits`` and for the next step: residual, attention, MLP."""
        if self.shape.norm_before_residual:
            hidden_TH = self._hidden_norm(hidden_TH)
        residual_TH = self._out(attended_TNE.flatten(1)).add_(hidden_TH)
        gate, up = self._gate_up(self._unit(residual_TH)).chunk(2, dim=-1)
        out: Tensor = self._down(F.silu(gate).mul_(up)).add_(residual_TH)
        return self._norm(out) if self.shape.is_normed else out

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Return logits [T, D] over the draft vocabulary from the output of ``finish``."""
        scores: Tensor = self._lm_head(hidden_TH if self.shape.is_normed else self._unit(hidden_TH))
        return scores


class _SharedScaleInt8(PackedInt8):
    """Inputs share one scale: a draft step's rows are similar, and one kernel finds the scale, rounds and multiplies.

    A row's product depends in its last bits on the rest of the batch, as it may for drafts.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] → [.., O]."""
        out: Tensor = torch.ops.quantized.linear_dynamic(x, self._packed)
        return out


def _with_gains(weight_OI: Tensor, gains: Sequence[Tensor]) -> Tensor:
    """Scale a matrix by the gains [W] of the norms of its inputs, and by the factor that ``UnitNorm`` leaves out."""
    return weight_OI * torch.cat(list(gains)) * len(gains[0]) ** 0.5 if gains else weight_OI


def fastest_dtype(device: torch.device) -> WeightDtype:
    """Return the dtype of packed drafts on this machine."""
    if device.type == "cuda":
        return "float16"
    if not has_fbgemm():
        return "float32"
    return "int8" if torch.cpu._is_vnni_supported() else "float16"


def _pair(weight_OI: Tensor, head_size: int) -> Tensor:
    """Reorder the outputs of each head: entry i, which is rotated with entry i + e, precedes it directly."""
    return weight_OI.view(-1, 2, head_size // 2, weight_OI.shape[1]).transpose(1, 2).reshape(weight_OI.shape)


def _rotations(shape: DraftShape, positions: int) -> Tensor:
    """Return the rotations [P, e] of the positions as complex numbers."""
    cos_1PE, sin_1PE = (
        x[0] for x in rotary_angles(torch.arange(positions)[None], shape.head_dim, shape.rope_theta, shape.rope_scaling)
    )
    return torch.complex(*(x[0, :, : shape.head_dim // 2].contiguous() for x in (cos_1PE, sin_1PE)))
