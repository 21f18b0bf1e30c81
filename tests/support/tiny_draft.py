"""The shape of a draft small enough to register and read quickly."""

from schemas.speculator.checkpoint import shape_for_target

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
