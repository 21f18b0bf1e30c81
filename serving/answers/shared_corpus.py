"""Fills the corpus of a server whose plugin drafts from it: with its own finished answers, and those of other nodes."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.answers import Answer, cut_answer
from schemas.settings import Settings
from serving.answers.answer_consumer import AnswerConsumer
from serving.answers.answer_counts import AnswerCounts
from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.base import Request


class SharedCorpus:
    """A corpus and what fills it, from any thread but the one that drafts.

    Args:
        settings: Broker, topic, scope and size.
        vocabulary: Size of the target's vocabulary.
    """

    def __init__(self, settings: Settings, vocabulary: int) -> None:
        serve, self._vocabulary = settings.serve, vocabulary
        self.corpus = ScopedCorpus(serve.suffix_scope, serve.suffix_corpus_bytes, settings.kafka.retention)
        is_shared = serve.suffix_scope != "request"
        self._consumer = AnswerConsumer(settings.kafka, serve, self._learn) if is_shared else None

    def start(self, line: str) -> None:
        """Start to read the answers of a line."""
        if self._consumer is not None:
            self._consumer.start(line, self._vocabulary)

    def add(self, request: Request, output: Sequence[int]) -> None:
        """Add the answer to a request that may be traced."""
        if request.trace:
            self.corpus.offer([(request.label, cut_answer(request.prompt, output)[1])])

    def counts(self) -> AnswerCounts:
        """Return the counts of answers of other nodes."""
        return self._consumer.counts() if self._consumer is not None else AnswerCounts(0, {})

    def stop(self) -> None:
        """Stop to read."""
        if self._consumer is not None:
            self._consumer.stop()

    def _learn(self, answers: Sequence[Answer]) -> None:
        self.corpus.offer((answer.label, answer.tokens) for answer in answers)
