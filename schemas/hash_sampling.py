"""Chance that comes out the same wherever and whenever it is asked for: drawn from a name, not from a generator."""

from __future__ import annotations

import hashlib


def fixed_chance(name: str, purpose: str = "") -> float:
    """A number from [0, 1) that the name decides; over many names they are spread evenly.

    Args:
        name: What it is drawn for, as a request's id.
        purpose: What it is drawn to decide, up to 16 bytes: different purposes draw independently.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8, person=purpose.encode()).digest()
    # As many bits as a float holds: of all 64, the highest would be rounded up to 1.
    return (int.from_bytes(digest) >> 11) / 2**53
