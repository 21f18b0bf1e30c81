"""Who may use the admin endpoints: the bearer of any of the node's tokens.

Tokens of the file are read at every call, which are few: a token is added or taken away while the node runs. To rotate
one, add the new token as a line, give it to those who use it, and take the old line away.
"""

from __future__ import annotations

import hmac
from pathlib import Path

import structlog

from schemas.settings import Serve, SettingsError

log = structlog.get_logger()


class AdminTokens:
    """The tokens of a node as they are now."""

    def __init__(self, serve: Serve) -> None:
        """Look at the file once.

        Raises:
            SettingsError: it cannot be read.
        """
        self._own = serve.admin_token.get_secret_value().encode()
        self._file = Path(serve.admin_tokens_file) if serve.admin_tokens_file else None
        try:
            self._in_file()
        except OSError as error:
            raise SettingsError(f"serve.admin_tokens_file {self._file}: {error.strerror}") from error

    def now(self) -> list[bytes]:
        """Every token that opens; none from a file that cannot be read any more."""
        own = [self._own] if self._own else []
        try:
            return own + self._in_file()
        except OSError as error:
            log.warning("admin_tokens_unreadable", file=str(self._file), why=error.strerror)
            return own

    def _in_file(self) -> list[bytes]:
        if self._file is None:
            return []
        lines = (line.strip() for line in self._file.read_bytes().splitlines())
        return [line for line in lines if line and not line.startswith(b"#")]


def opens(given: bytes, tokens: list[bytes]) -> bool:
    """Whether it is one of the tokens; takes as long whichever it is."""
    return sum(hmac.compare_digest(given, token) for token in tokens) > 0
