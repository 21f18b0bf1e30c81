"""Sampling by hash: a number derived from a name, equal in every process and at every time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def hash_ratio(name: str, purpose: str = "") -> float:
    """Return a number in [0, 1) derived from a name; the numbers of many names are uniformly distributed.

    Args:
        name: Subject of the decision, such as a request id.
        purpose: Decision to be made, up to 16 bytes; the numbers of different purposes are independent.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8, person=purpose.encode()).digest()
    # 53 bits, the precision of a float: the largest 64-bit number would round up to 1.
    return (int.from_bytes(digest) >> 11) / 2**53


def is_in_share(request: str, share: float) -> bool:
    """Return whether a request is among the share that a lagging trainer reads.

    Nodes and trainer decide by the same number, so a request that the nodes keep is not skipped by the trainer.
    """
    return hash_ratio(request, "aurora-lag") < share


def prompt_key(prompt: str | Sequence[int]) -> str:
    """Return the prompt key, 16 hexadecimal digits.

    Args:
        prompt: Text of the first user message, which all turns of a conversation have in common; or the prompt's token
            ids, where messages are not known.
    """
    content = prompt.encode() if isinstance(prompt, str) else np.asarray(prompt, "<i4").tobytes()
    return hashlib.blake2b(content, digest_size=8, person=b"aurora-prompt").hexdigest()
