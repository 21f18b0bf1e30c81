"""The prompt as the beginning of a text completion (``echo``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from serving.engines.base import TokenLogprobs
from serving.http.detokenizer import Detokenizer, ScoredToken, TextDelta, Tokenizer


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """Text of a prompt, and where its tokens begin in it."""

    text: str
    ids: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def read(cls, tokenizer: Tokenizer, prompt: str | list[int], ids: Sequence[int]) -> EchoedPrompt:
        """Return the prompt with its tokens' places.

        The text is the client's own. Where it is not the end of what the tokens say (a tokenizer may normalize), or the
        client sent token ids, it is what the tokens say.
        """
        detokenizer, decoded, starts = Detokenizer(tokenizer, skip_special_tokens=False), "", list[int]()
        for token in ids:
            starts.append(len(decoded))
            decoded += detokenizer.feed([token])
        decoded += detokenizer.finish()
        text = prompt if isinstance(prompt, str) and decoded.endswith(prompt) else decoded
        # Tokens that the tokenizer puts before a text have no place in it.
        before = len(decoded) - len(text)
        return cls(text, tuple(ids), tuple(max(start - before, 0) for start in starts))


@dataclass(slots=True)
class Echo:
    """Puts a prompt before the first delta of an answer."""

    prompt: EchoedPrompt
    logprobs: bool
    """Whether the prompt's tokens are reported."""
    scores: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens after the first, as they arrive."""
    is_shown: bool = False

    def extend(self, delta: TextDelta) -> TextDelta:
        """Return a delta of the answer, behind the prompt if it is the first, with its tokens' places in the whole."""
        text, length = self.prompt.text, len(self.prompt.text)
        tokens = tuple(replace(token, offset=token.offset + length) for token in delta.tokens)
        if self.is_shown:
            return TextDelta(delta.text, tokens)
        self.is_shown = True
        if self.logprobs:
            scored = zip(self.prompt.ids, self.prompt.offsets, [None, *self.scores], strict=True)
            tokens = (*(ScoredToken(*one) for one in scored), *tokens)
        return TextDelta(text + delta.text, tokens)
