"""The shape of a draft small enough to register and read quickly, and a draft that is sometimes accepted."""

import torch
from torch import Tensor

from schemas.speculator.checkpoint import shape_for_target
from schemas.speculator.network import DraftShape, EagleDraft, random_draft

SHAPE = shape_for_target(
    {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "vocab_size": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "num_hidden_layers": 8,
    },
    draft_vocab_size=16,
)


def oracle_draft(shape: DraftShape, head_VH: Tensor, kept_D: Tensor | None = None) -> EagleDraft:
    """Return a draft that is sometimes accepted: it uses the target's own output layer.

    Args:
        shape: Shape of the draft.
        head_VH: The target's output layer.
        kept_D: Its draft vocabulary; None for the lowest ids.
    """
    draft = random_draft(shape, 5, kept_D)
    with torch.no_grad():
        draft.fc.weight.zero_()
        draft.fc.weight[:, -shape.hidden_size :] = torch.eye(shape.hidden_size)
        draft.midlayer.self_attn.o_proj.weight.zero_()
        draft.midlayer.mlp.down_proj.weight.zero_()
        draft.lm_head.weight.copy_(head_VH[draft.t2d])
    return draft
