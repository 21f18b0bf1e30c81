"""A corpus of a server's own answers."""

from __future__ import annotations

from serving.answers.shared_corpus import SharedCorpus


class UnreadCorpus(SharedCorpus):
    """Reads no topic."""

    def start(self, line: str) -> None:
        self.started = line
