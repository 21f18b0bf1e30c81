"""``python -m ops.deploy.probe URL``: exit code 0 where it answers 200, else what it said; for health checks of
containers.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 4


def probe(url: str) -> str:
    """What is wrong with the answer; empty where nothing is."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S):  # noqa: S310 - the address is ours
            return ""
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read(2000).decode(errors='replace')}"
    except OSError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(probe(sys.argv[1]) or 0)
