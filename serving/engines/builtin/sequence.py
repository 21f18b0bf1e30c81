"""The state of one request, from the waiting queue to its finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import structlog
from torch import Tensor

from schemas.speculator.acceptance import MIN_TEMPERATURE
from schemas.suffix_corpus import SequenceHistory
from schemas.trace.record import DraftSource
from serving.engines.base import Finish, Output, Request, RequestStats
from serving.engines.builtin.grammar import GrammarMatcher
from serving.engines.builtin.logits_processors import LogitsProcessor

log = structlog.get_logger()


class PrefixRoot(NamedTuple):
    """What sequences share cached prefixes under: those with equal roots may use each other's."""

    label: str | None = None
    salt: str | None = None
    group: str | None = None
    """Request whose choices share its prompt, and nothing with other requests; None for any request."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request that waits or runs. ``tokens`` holds prompt and output; the target has not consumed the last one."""

    request: Request
    on_output: Callable[[Output], None]
    max_len: int
    """Maximum number of tokens, prompt and output together."""
    seed: int
    """Seed of the noise that decides sampled tokens."""
    tokens: list[int]
    slot: int = -1
    """The sequence's place in the KV caches of target and draft; -1 while it waits."""
    submitted: float = field(default_factory=time.monotonic)
    """Monotonic time at which the request arrived."""
    queue_s: float | None = None
    """Seconds for which it waited for its slot; None while it waits."""
    processors: tuple[LogitsProcessor, ...] = ()
    """Change the target's logits, in this order."""
    grammar: GrammarMatcher | None = None
    """One of ``processors``, if the output must match a grammar."""
    num_cached_tokens: int = 0
    """Tokens committed to the target's KV cache."""
    num_draft_skipped_tokens: int = 0
    """Tokens at the beginning of the prompt that the speculator does not read."""
    num_draft_cached_tokens: int = 0
    """Tokens in the speculator's KV cache, from the first that it reads on."""
    history: SequenceHistory = field(default_factory=SequenceHistory)
    """Where the sequence repeats itself."""
    unseen_features: list[Tensor] = field(default_factory=list)
    """Target features [.., F] of committed tokens that the draft has not seen."""
    keeps_features: bool = True
    """Whether a speculator reads features."""
    root: PrefixRoot | None = None
    """What the sequence shares cached prefixes under; None if it shares none."""
    num_prefix_tokens: int = 0
    """Prompt tokens from the prefix cache."""
    num_shared_tokens: int = 0
    """Tokens that came from the prefix cache or were offered to it, in whole blocks."""
    unshared_features: list[Tensor] = field(default_factory=list)
    """Target features [.., F] of the tokens after them."""
    finish: Finish | None = None
    error: str | None = None
    """Why the sequence failed."""
    verify_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    suffix_accepted_tokens: int = 0
    """Accepted tokens that only the suffix drafter proposed."""
    speculators: list[str] = field(default_factory=list)

    @property
    def is_prefilling(self) -> bool:
        """Whether the target has not consumed the whole prompt."""
        return self.num_cached_tokens < len(self.request.prompt)

    @property
    def may_load(self) -> bool:
        """Whether the next prompt tokens may come from the prefix cache: whole blocks were read so far.

        A request for log-probabilities of its prompt needs the target's scores of every token.
        """
        return (
            self.root is not None
            and self.request.prompt_logprobs is None
            and self.is_prefilling
            and self.num_cached_tokens == self.num_shared_tokens
        )

    def waits_for(self, other: Sequence, block: int) -> bool:
        """Return whether the next ``block`` tokens are soon in the prefix cache, because ``other`` reads them."""
        end, prompt = self.num_cached_tokens + block, other.request.prompt
        return (
            self.may_load
            and self.root == other.root
            and other.num_cached_tokens < end <= len(prompt)
            and end < len(self.request.prompt)
            and self.request.prompt[:end] == prompt[:end]
        )

    @property
    def is_greedy(self) -> bool:
        """Whether each output token is the target's argmax."""
        return self.request.temperature < MIN_TEMPERATURE

    @property
    def output(self) -> list[int]:
        """Output tokens so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def room(self) -> int:
        """Number of output tokens that still fit."""
        return self.max_len - len(self.tokens)

    @property
    def num_draft_seen_tokens(self) -> int:
        """Tokens that the speculator has read or skips."""
        return self.num_draft_skipped_tokens + self.num_draft_cached_tokens

    @property
    def stats(self) -> RequestStats:
        """How the request was decoded so far."""
        return RequestStats(
            self.verify_steps,
            self.draft_tokens,
            self.accepted_tokens,
            tuple(self.speculators),
            self.suffix_accepted_tokens,
            self.num_prefix_tokens,
            self.queue_s,
        )

    @contextmanager
    def contain(self) -> Iterator[None]:
        """End this sequence alone with an error if the block fails."""
        try:
            yield
        except Exception as error:
            # Whatever failed, it was work for this sequence: the others continue.
            log.exception("sequence_failed", request=self.request.id)
            self.finish, self.error = "error", self.error or f"{type(error).__name__}: {error}"

    def stop_drafting(self) -> None:
        """Decode without drafts from the next verify step on."""
        self.request = replace(self.request, speculate=False)
        self.unseen_features.clear()

    def take_features(self, count: int) -> list[Tensor]:
        """Remove the oldest ``count`` tokens' features from the unseen ones and return them."""
        taken: list[Tensor] = []
        while count:
            features_TF = self.unseen_features.pop(0)
            taken.append(features_TF[:count])
            if len(features_TF) > count:
                self.unseen_features.insert(0, features_TF[count:])
            count -= len(taken[-1])
        return taken

    def truncate(self, tokens: list[int], eos_ids: Collection[int]) -> tuple[list[int], Finish | None]:
        """Cut decided tokens at the end of the output, so that the last output token is a bonus token."""
        room, request = self.room, self.request
        for i, token in enumerate(tokens[:room]):
            if token in request.stop_ids or (token in eos_ids and not request.ignore_eos):
                return tokens[: i + 1], "stop"
        if len(tokens) >= room:
            return tokens[:room], "length"
        return tokens, None

    def commit(self, features_TF: Tensor, output: list[int], draft_tokens: int, accepted: Seq[DraftSource]) -> None:
        """Advance by one verify step and count it; prefill is not counted.

        Args:
            features_TF: Target features of the tokens that were committed to the target's KV cache.
            output: Tokens that the step added to the output.
            draft_tokens: Number of draft tokens that the target verified.
            accepted: The drafters that proposed each accepted draft token.
        """
        # Nothing but the other choices shares with a group, and they share the prompt alone.
        if self.root is not None and (self.is_prefilling or self.root.group is None):
            self.unshared_features.append(features_TF)
        self.verify_steps += not self.is_prefilling
        self.draft_tokens += draft_tokens
        self.accepted_tokens += len(accepted)
        self.suffix_accepted_tokens += sum(source == DraftSource.SUFFIX for source in accepted)
        self._keep_features(features_TF)
        self.num_cached_tokens += len(features_TF)
        self.tokens += output

    def extend_prefix(self, features_TF: Tensor) -> None:
        """Advance by prompt tokens from the prefix cache, with their features."""
        self._keep_features(features_TF.float())
        self.num_prefix_tokens += len(features_TF)
        self.num_cached_tokens += len(features_TF)
        self.num_shared_tokens = self.num_cached_tokens

    def _keep_features(self, features_TF: Tensor) -> None:
        """Keep the features of the next tokens as far as the speculator reads them."""
        read_TF = features_TF[max(self.num_draft_skipped_tokens - self.num_cached_tokens, 0) :]
        if self.request.speculate and self.keeps_features and len(read_TF):
            self.unseen_features.append(read_TF)
