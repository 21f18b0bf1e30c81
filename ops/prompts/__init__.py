"""Vendored prompts of two domains; ``SOURCES.md`` says where they come from."""

from __future__ import annotations

import json
from pathlib import Path

DOMAINS = ("code", "math")
"""In the order in which the demo sends them."""


def read(domain: str) -> list[str]:
    """The prompts of one domain, in their fixed order."""
    lines = Path(__file__).with_name(f"{domain}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]
