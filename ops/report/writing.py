"""Where a page that was asked for goes."""

from __future__ import annotations

from pathlib import Path

from schemas.errors import UserError


def write_page(option: str, file: Path, text: str) -> None:
    """Write a page, and the folder that it is to lie in.

    Args:
        option: What named the file, for the error.
        file: Where it goes.
        text: The page.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise UserError(f"{option} {file}: {error.strerror}") from error
