"""The errors that the ``aurora`` command tells in one line, wherever they are raised."""

from __future__ import annotations


class UserError(RuntimeError):
    """What a person in front of the terminal can put right; the message says how."""
