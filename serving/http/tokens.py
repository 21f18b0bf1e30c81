"""Bearer tokens of the HTTP APIs, from a file that can change while the node runs."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

import structlog

from schemas.settings import SettingsError

log = structlog.get_logger()


class TokenFile:
    """A file of tokens, one per line; a line that begins with ``#`` is a comment.

    The file is read at every call: a token can be added or removed while the node runs. To rotate a token, add the new
    one as a line, hand it to its users, and remove the old line.
    """

    def __init__(self, setting: str, path: str) -> None:
        """Read the file once.

        Args:
            setting: Name of the setting that names the file.
            path: The file.

        Raises:
            SettingsError: the file cannot be read.
        """
        self._setting, self._path = setting, Path(path)
        try:
            self._parse()
        except OSError as error:
            raise SettingsError(f"{setting} {path}: {error.strerror}") from error

    def read(self) -> list[bytes]:
        """Return the current tokens; none if the file is unreadable."""
        try:
            return self._parse()
        except OSError as error:
            log.warning("tokens_unreadable", setting=self._setting, file=str(self._path), why=error.strerror)
            return []

    def _parse(self) -> list[bytes]:
        lines = (line.strip() for line in self._path.read_bytes().splitlines())
        return [line for line in lines if line and not line.startswith(b"#")]


def is_authorized(authorization: str, tokens: Sequence[bytes]) -> bool:
    """Return whether an ``Authorization`` header holds one of the tokens; the time does not depend on which.

    Args:
        authorization: Value of the header; empty without one.
        tokens: The valid tokens.
    """
    scheme, _, token = authorization.partition(" ")
    # Header values arrive as latin-1; the token may be any bytes.
    sent = token.strip().encode("latin-1")
    # The sum compares every token.
    return scheme.lower() == "bearer" and sum(hmac.compare_digest(sent, one) for one in tokens) > 0
