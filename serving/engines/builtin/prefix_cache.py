"""The prefix cache: keys, values and features of prompt and answer tokens, for later sequences that begin alike.

Tokens are cached in blocks. As in vLLM, a block is found by the block before it and its own tokens, so a match is a
chain of blocks from a sequence's first token on. The table compares the tokens themselves: equal hashes of different
prompts cannot be confused. A chain begins at a *root*, and only sequences with equal roots share blocks.

A block holds the target's features in bf16 beside the keys and values. So a trace has the features of cached tokens as
well, and the speculator consumes them as it consumes a prompt: a swap leaves nothing stale.

A full cache evicts the block that was used least recently, of one sequence the last one first.

Shape suffixes: B tokens of a block, F features.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

import structlog
import torch
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from torch import Tensor

from schemas.settings import SettingsError
from schemas.settings.sections import PrefixScope
from serving.engines.base import Request
from serving.engines.builtin.kv_cache import KVCache
from serving.engines.builtin.sequence import PrefixRoot, Sequence

log = structlog.get_logger()

BLOCK_TOKENS = 16
"""Copying a block takes a thousandth of the time of its tokens' prefill, so the size is chosen for exact matches."""


class _Key(NamedTuple):
    parent: PrefixRoot | int
    """The root, or the number of the block before."""
    tokens: tuple[int, ...]


class _Block(NamedTuple):
    key: _Key
    number: int
    """Never used again, so that a block whose parent was evicted is not found."""
    row: int
    """Where its tensors lie."""


class PrefixCache:
    """Copies blocks into the slots of sequences and out of them. The engine's thread calls all methods but ``collect``.

    Args:
        slots: The target's keys and values.
        feature_width: F.
        max_bytes: Bound of the blocks' size; 0 caches nothing.
        scope: Which requests share blocks.

    Raises:
        SettingsError: the bound is smaller than a block.
    """

    def __init__(self, slots: KVCache, feature_width: int, max_bytes: int, scope: PrefixScope) -> None:
        self.scope, self._slots = scope, slots
        block = slots.allocate_blocks(1, BLOCK_TOKENS)
        self._block_bytes = block.nbytes + BLOCK_TOKENS * feature_width * torch.bfloat16.itemsize
        if 0 < max_bytes < self._block_bytes:
            raise SettingsError(
                f"serve.prefix_cache_bytes is {max_bytes}, but {BLOCK_TOKENS} tokens of this target take "
                f"{self._block_bytes} bytes; set more, or 0 for no prefix cache"
            )
        rows = max_bytes // self._block_bytes
        self._entries = slots.allocate_blocks(rows, BLOCK_TOKENS)
        self._features_RBF = torch.empty(
            rows, BLOCK_TOKENS, feature_width, dtype=torch.bfloat16, device=self._entries.device
        )
        self._free_rows = list(reversed(range(rows)))
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        """The least recently used block first."""
        self._numbers = count()
        self.is_on = rows > 0
        self.hits = self.cached_tokens = self.evictions = self.failures = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks; callable from any thread."""
        return len(self._blocks) * self._block_bytes

    def choose_root(self, request: Request) -> PrefixRoot | None:
        """Return what the request shares blocks under; None if no other request may use its blocks.

        The choices of one request always share its prompt.
        """
        if not self.is_on:
            return None
        match self.scope:
            case "node":
                return PrefixRoot(salt=request.cache_salt)
            case "label" if request.label is not None or request.cache_salt is not None:
                return PrefixRoot(label=request.label, salt=request.cache_salt)
        return None if request.group is None else PrefixRoot(group=request.group)

    def load(self, seq: Sequence) -> Tensor | None:
        """Copy the next cached blocks of a prompt into the sequence's slot, as far as the target has not read it.

        The prompt's last token is never taken from the cache, because the target's choice follows it.

        Returns:
            The features [.., F] of the copied tokens, in bf16; None if no block was found.
        """
        if seq.root is None or not self.is_on or not seq.may_load:
            return None
        start = seq.num_cached_tokens
        blocks = self._find(seq.root, seq.request.prompt[:-1])
        found = blocks[start // BLOCK_TOKENS :]
        if not found:
            return None
        for i, block in enumerate(found):
            self._slots.copy_in(seq.slot, start + i * BLOCK_TOKENS, self._entries[block.row])
        features_TF = self._features_RBF[[block.row for block in found]].flatten(0, 1)
        self._use(blocks)
        self.hits += seq.num_prefix_tokens == 0
        self.cached_tokens += len(features_TF)
        seq.extend_prefix(features_TF)
        return features_TF

    def store(self, seq: Sequence) -> None:
        """Cache the complete blocks of the tokens that the target has consumed, of prompt and answer."""
        if seq.root is None or not self.is_on:
            seq.unshared_features.clear()
            return
        length = sum(map(len, seq.unshared_features))
        start, end = seq.num_shared_tokens, (seq.num_shared_tokens + length) // BLOCK_TOKENS * BLOCK_TOKENS
        if end <= start:
            return
        features_TF = torch.cat(seq.unshared_features)
        chain = self._find(seq.root, seq.tokens[:end])
        self._use(chain)
        # If a block before ``start`` was evicted, its features are gone, and later blocks cannot be found without it.
        if len(chain) * BLOCK_TOKENS >= start:
            for at in range(len(chain) * BLOCK_TOKENS, end, BLOCK_TOKENS):
                row = self._take_row(chain)
                if row is None:
                    break
                self._slots.copy_out(seq.slot, at, self._entries[row])
                self._features_RBF[row] = features_TF[at - start : at - start + BLOCK_TOKENS]
                key = _Key(chain[-1].number if chain else seq.root, tuple(seq.tokens[at : at + BLOCK_TOKENS]))
                self._blocks[key] = _Block(key, next(self._numbers), row)
                chain.append(self._blocks[key])
            self._use(chain)
        seq.num_shared_tokens, seq.unshared_features = end, [features_TF[end - start :].clone()]

    def forget(self, seq: Sequence) -> None:
        """Remove the blocks of a sequence that failed: their values may not be finite."""
        if seq.root is not None:
            for block in self._find(seq.root, seq.tokens):
                del self._blocks[block.key]
                self._free_rows.append(block.row)

    @contextmanager
    def contain(self) -> Iterator[None]:
        """Turn the cache off if the block fails: the target can read every prompt itself."""
        try:
            yield
        except Exception:
            log.exception("prefix_cache_failed")
            self.failures += 1
            self.is_on = False
            self._blocks.clear()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        for name, text, value in (
            ("aurora_serve_prefix_cache_hits", "Choices that began with cached tokens.", self.hits),
            ("aurora_serve_prompt_tokens_cached", "Prompt tokens from the prefix cache.", self.cached_tokens),
            ("aurora_serve_prefix_cache_evictions", "Blocks evicted from the prefix cache.", self.evictions),
            (
                "aurora_serve_prefix_cache_failures",
                "Failures of the prefix cache; the first one turned it off.",
                self.failures,
            ),
        ):
            yield CounterMetricFamily(name, text, value=value)
        yield GaugeMetricFamily("aurora_serve_prefix_cache_bytes", "Bytes of the prefix cache.", value=self.nbytes)

    def _find(self, root: PrefixRoot, tokens: Seq[int]) -> list[_Block]:
        """Return the cached blocks of a sequence that begins with these tokens, from the first one on."""
        blocks: list[_Block] = []
        parent: PrefixRoot | int = root
        for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
            block = self._blocks.get(_Key(parent, tuple(tokens[end - BLOCK_TOKENS : end])))
            if block is None:
                break
            blocks.append(block)
            parent = block.number
        return blocks

    def _use(self, chain: Seq[_Block]) -> None:
        """Mark a chain as used. The last block becomes the oldest of it, so the cache evicts it before the others."""
        for block in reversed(chain):
            self._blocks.move_to_end(block.key)

    def _take_row(self, chain: Seq[_Block]) -> int | None:
        """Return a row for a further block of a chain, an evicted one if necessary; None if the chain has all rows."""
        if self._free_rows:
            return self._free_rows.pop()
        oldest = next(iter(self._blocks.values()))
        if oldest in chain:
            return None
        del self._blocks[oldest.key]
        self.evictions += 1
        return oldest.row
