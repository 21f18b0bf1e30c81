"""How much of a request a draft attends to: the same tokens where it is trained, scored and served."""

from __future__ import annotations

LOOKAHEAD_TOKENS = 17
"""Tokens that a part of a request keeps after its own rows: the longest chain that is trained or scored, and the bonus
token after it."""


def count_skipped(prompt_tokens: int, context_tokens: int) -> int:
    """Return how many tokens at the beginning of a prompt the draft does not attend to.

    The first row that trains is ``LOOKAHEAD_TOKENS`` before the last token of the prompt, and attends to
    ``context_tokens`` rows before it.

    Args:
        prompt_tokens: Length of the prompt.
        context_tokens: ``train.context_tokens``.
    """
    return max(0, prompt_tokens - 1 - LOOKAHEAD_TOKENS - context_tokens)
