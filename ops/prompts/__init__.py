"""Vendored prompts of four domains; ``SOURCES.md`` says where they come from."""

from __future__ import annotations

import json
from pathlib import Path

DOMAINS = ("code", "math", "sql", "chat")
"""In the order in which they are sent where the order matters; the demo sends the first two."""


def read(domain: str) -> list[str]:
    """The prompts of one domain, in their fixed order."""
    lines = Path(__file__).with_name(f"{domain}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]
