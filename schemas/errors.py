"""Errors that the ``aurora`` command prints as one line, without a traceback."""

from __future__ import annotations


class UserError(RuntimeError):
    """An error that the user can fix; the message says how."""


def describe_error(error: Exception) -> str:
    """Return the class of a library's error and the first line of its message."""
    reason = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {reason}"
