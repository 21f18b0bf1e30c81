"""Vendored prompts of the demo; ``SOURCES.md`` names their sources."""

from __future__ import annotations

import json
from pathlib import Path

DOMAINS = ("code", "math")
"""In the order in which the demo sends them."""


def read_prompts(domain: str, folder: Path | None = None) -> list[str]:
    """Return the prompts of a domain in their fixed order, from this folder or another one."""
    file = (folder or Path(__file__).parent) / f"{domain}.jsonl"
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]
