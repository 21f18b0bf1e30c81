"""Grammars: what an output must match, as a logits processor that also prunes and extends drafts.

A grammar is text in llguidance's language, or a JSON object that embeds several. A grammar that holds up in a child
process (``grammar_check``) is compiled here, for the target's vocabulary. Each sequence has its own matcher.

Shape suffixes: V vocabulary of the target.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from schemas.trace.record import ROOT, DraftSource
from serving.engines.builtin.drafter import DraftNode, DraftTree
from serving.engines.builtin.grammar_check import LIMITS, MAX_GRAMMAR_BYTES, GrammarChecker, GrammarError

_MAX_CACHED = 64
"""Compiled grammars that are kept, at most; their texts have at most ``_MAX_CACHED_BYTES``."""
_MAX_CACHED_BYTES = 1 << 20
_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
"""Bytes as byte-level vocabularies write them."""


class GrammarMatcher:
    """Follows one output through a grammar: a ``LogitsProcessor``."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._read = 0
        """Output tokens that the matcher has consumed."""

    def process(self, logits_V: Tensor, output: Seq[int], /) -> Tensor:
        """Exclude the tokens that the grammar forbids after ``output``.

        Raises:
            GrammarError: the grammar is too complex to be followed.
        """
        self._advance(output)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed_V = np.unpackbits(bits, count=len(logits_V), bitorder="little")
        return logits_V.masked_fill_(torch.from_numpy(allowed_V == 0), -torch.inf)

    def constrain(self, tree: DraftTree, output: Seq[int], depth: int) -> DraftTree:
        """Prune the draft tokens that the grammar forbids, and add the tokens that it forces.

        A forced token is the only one that the grammar allows, so the target accepts it wherever it accepts the tokens
        before it.

        Args:
            tree: Draft tokens after ``output``.
            output: All output tokens.
            depth: Maximum depth of forced tokens.

        Raises:
            GrammarError: the grammar is too complex to be followed.
        """
        self._advance(output)
        growth = _Growth(self._matcher, tree, depth)
        growth.grow(ROOT, ROOT, 0, 1.0)
        self._check()
        return tree.with_nodes(tuple(growth.nodes))

    def _advance(self, output: Seq[int]) -> None:
        for token in output[self._read :]:
            # The end of a complete output is a token that the matcher does not read; with ignore_eos more follow.
            if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
                self._check()
                raise GrammarError(f"the grammar does not allow token {token}")
        self._read = len(output)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_first_line(self._matcher.get_error()))


class _Growth:
    """Copies the allowed nodes of a draft tree, and adds forced ones; the matcher ends where it began."""

    def __init__(self, matcher: LLMatcher, tree: DraftTree, depth: int) -> None:
        self.nodes: list[DraftNode] = []
        self._matcher, self._tree, self._depth = matcher, tree, depth
        self._children: dict[int, list[int]] = defaultdict(list)
        for i, node in enumerate(tree.nodes):
            self._children[node.parent].append(i)

    def grow(self, old: int | None, new: int, depth: int, chance: float) -> None:
        """Add what may follow a node.

        Args:
            old: The node in the drafted tree; None if the drafters did not propose it.
            new: The same node in the new tree.
            depth: Its depth.
            chance: Its chance in the new tree.
        """
        if self._matcher.is_stopped():
            return
        forced = self._matcher.compute_ff_tokens()[: max(self._depth - depth, 0)]
        count = 0
        for token in forced:
            if not self._matcher.try_consume_tokens([token]):
                break
            count += 1
            # Whether a drafter proposed it or not, the token counts for none.
            old = next((i for i in self._children_of(old) if self._tree.nodes[i].token == token), None)
            new = self._add(DraftNode(token, new, depth + count, 0.0, 1.0, chance, DraftSource.GRAMMAR))
        if count:
            self.grow(old, new, depth + count, chance)
            self._matcher.rollback(count)
            return
        above = 1.0 if old is None or old == ROOT else self._tree.nodes[old].chance
        for i in self._children_of(old):
            node = self._tree.nodes[i]
            if self._matcher.try_consume_tokens([node.token]):
                likely = chance * min(node.chance / max(above, 1e-9), 1.0)
                self.grow(i, self._add(node._replace(parent=new, chance=likely)), depth + 1, likely)
                self._matcher.rollback(1)

    def _add(self, node: DraftNode) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _children_of(self, old: int | None) -> list[int]:
        return [] if old is None else self._children[old]


class Grammar:
    """A compiled grammar; any number of sequences follow it at the same time."""

    def __init__(self, start: LLMatcher) -> None:
        self._start = start

    def create_matcher(self) -> GrammarMatcher:
        """Return a matcher at the start of an output."""
        return GrammarMatcher(self._start.deep_copy())


class GrammarCompiler:
    """Compiles grammars for a target's vocabulary, one at a time, and caches them. Thread-safe.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        vocabulary: Size of the target's vocabulary.
        eos_ids: Tokens that end an output.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos_ids = tokenizer, vocabulary, sorted(eos_ids)
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._checker = GrammarChecker()
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None

    def compile(self, text: str) -> Grammar:
        """Return a compiled grammar; takes up to seconds.

        Raises:
            GrammarError: the grammar is invalid or too complex, or the target's vocabulary cannot spell it.
        """
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"it is larger than {MAX_GRAMMAR_BYTES} bytes")
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text]
            self._checker.check(text)
            if self._tokens is None:
                self._tokens = self._read_tokens()
            matcher = LLMatcher(self._tokens, text, limits=LIMITS, log_level=0)
            if matcher.is_error():
                raise GrammarError(_first_line(matcher.get_error()))
            # Otherwise a grammar that the vocabulary cannot spell fails in the middle of a request.
            matcher.compute_bitmask()
            if matcher.is_error():
                raise GrammarError(f"no token of the target begins it: {_first_line(matcher.get_error())}")
            self._compiled[text] = grammar = Grammar(matcher)
            while len(self._compiled) > _MAX_CACHED or sum(map(len, self._compiled)) > _MAX_CACHED_BYTES:
                self._compiled.popitem(last=False)
            return grammar

    def _read_tokens(self) -> LLTokenizer:
        """Return the vocabulary as llguidance reads it; llguidance's own reader misreads combined decoders."""
        if not self._eos_ids:
            raise GrammarError("the target has no token that ends an output")
        spelled = _SpelledTokenizer(self._tokenizer, self._eos_ids[0])
        size = max(len(spelled.tokens), self._vocabulary)
        return LLTokenizer(TokenizerWrapper(spelled), n_vocab=size, eos_token=self._eos_ids)


class _SpelledTokenizer:
    """A vocabulary with the bytes of each token, in the form that ``TokenizerWrapper`` reads."""

    def __init__(self, tokenizer: Any, eos_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_id, None
        # A copy: encoding changes the state of a tokenizer that other threads use.
        self._encoder = copy.deepcopy(tokenizer.backend_tokenizer)
        added = tokenizer.added_tokens_decoder
        pieces: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        is_sentencepiece = sum("▁" in (piece or "") for piece in pieces) > sum("Ġ" in (piece or "") for piece in pieces)
        spell = _spell_text if is_sentencepiece else _spell_bytes
        self.tokens = [
            added[i].content.encode() if i in added else spell(piece or "") for i, piece in enumerate(pieces)
        ]
        self.special_token_ids = [i for i, token in added.items() if token.special]

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids


def _spell_bytes(piece: str) -> bytes:
    """Return the bytes of an entry of a byte-level vocabulary; none for an entry of another kind."""
    return bytes(_BYTE_OF[char] for char in piece) if all(char in _BYTE_OF for char in piece) else b""


def _spell_text(piece: str) -> bytes:
    """Return the bytes of an entry of a SentencePiece vocabulary."""
    if piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:-1], 16)])
    return piece.replace("▁", " ").encode()


def _first_line(message: str) -> str:
    return message.partition("\n")[0] or "the grammar cannot be followed"
