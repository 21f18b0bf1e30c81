"""The corpus of a node, by scope: from whose answers a request is drafted.

``request``  The corpus is empty: a request is drafted from its own tokens alone.
``label``    Answers to requests with the same label. A request without a label has its own tokens alone.
``node``     Answers of this node.
``fleet``    Answers of all nodes.

All answers belong to the node's line: the consumer of the answers topic drops those of other lines.
"""

from __future__ import annotations

from collections.abc import Sequence

from schemas.settings.sections import SuffixScope
from serving.engines.builtin.suffix_corpus import NO_MATCH, Match, SuffixCorpus

_EVERYONE = 0
"""Owner of all answers where labels do not separate them."""
_OWNER_MASK = (1 << 31) - 1


class ScopedCorpus:
    """A ``SuffixCorpus`` in which a request finds only answers of its scope. Not thread-safe.

    Args:
        scope: Whose answers a request is drafted from.
        max_bytes: Bound of the corpus, over all labels; the oldest answers are overwritten, whatever their labels.

    Raises:
        ValueError: the bound is too small.
    """

    def __init__(self, scope: SuffixScope, max_bytes: int) -> None:
        self._scope = scope
        self._corpus = SuffixCorpus(max_bytes) if scope != "request" else None

    def find(self, label: str | None, tokens: Sequence[int], depth: int) -> Match:
        """Return the longest match of the end of ``tokens`` in the answers that a request with this label may use.

        Args:
            label: Label of the request.
            tokens: The sequence, or its last ``MAX_MATCH`` tokens.
            depth: Maximum number of tokens of a continuation.
        """
        owner = self._choose_owner(label)
        if self._corpus is None or owner is None:
            return NO_MATCH
        return self._corpus.find(tokens, depth, owner)

    def insert(self, label: str | None, tokens: Sequence[int]) -> None:
        """Add the answer to a request with this label, if the scope shares it.

        Args:
            label: Label of the request.
            tokens: The last ``MAX_MATCH`` tokens of the prompt, and the answer.
        """
        owner = self._choose_owner(label)
        if self._corpus is not None and owner is not None:
            self._corpus.insert(tokens, owner)

    def _choose_owner(self, label: str | None) -> int | None:
        """Return the owner of answers with this label in the corpus; None if they are not shared.

        Python's hash of a text has a key that each process draws at random, so a client cannot choose a label with the
        owner of another one.
        """
        match self._scope:
            case "request":
                return None
            case "label":
                return None if label is None else hash(label) & _OWNER_MASK
            case "node" | "fleet":
                return _EVERYONE
