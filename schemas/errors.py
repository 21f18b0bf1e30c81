"""Errors that the ``aurora`` command prints as one line, without a traceback."""

from __future__ import annotations


class UserError(RuntimeError):
    """An error that the user can fix; the message says how."""
