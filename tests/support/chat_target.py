"""A tiny random target with a tokenizer and a chat template, which can write conversations."""

from __future__ import annotations

from pathlib import Path

from tiny_target import EOS, VOCABULARY, write_tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

USER, END, ASSISTANT = 2, 3, 4
TEMPLATE = "w2 {{ messages[0]['content'] }} w3 w4"


def write_chat_target(folder: Path, *, vocabulary: int = VOCABULARY, hidden: int = 32) -> Path:
    """Save a target whose template is: the token USER, the user's message, END and ASSISTANT."""
    write_tiny_target(folder, vocabulary=vocabulary, hidden=hidden)
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"w{EOS}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=f"w{EOS}", eos_token=f"w{EOS}")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder
