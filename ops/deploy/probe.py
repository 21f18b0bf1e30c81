"""Health check of containers: ``python -m ops.deploy.probe URL`` exits with 0 if the URL answers 200.

Otherwise it prints the error and exits with 1. It uses only the standard library, so the registry image can run it.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 4


def probe(url: str) -> str:
    """Return the error of a URL; empty if it answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S):  # noqa: S310 - the address is ours
            return ""
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read(2000).decode(errors='replace')}"
    except OSError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(probe(sys.argv[1]) or 0)
