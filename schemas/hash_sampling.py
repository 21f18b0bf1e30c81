"""Sampling by hash: a number derived from a name, equal in every process and at every time."""

from __future__ import annotations

import hashlib


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
