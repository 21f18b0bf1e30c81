"""Prompts of six domains, as requests: the demo's ``code`` and ``math``, and the others of this folder.

The last prompts of each domain are held out: benchmarks measure with them and never train on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ops.demo import prompts as demo_prompts
from schemas.errors import UserError
from serving.engines.base import Request

DOMAINS = (*demo_prompts.DOMAINS, "sql", "chat")
"""In the order in which they are sent, where the order matters."""
REPETITIVE = ("edits", "tools")
"""Domains whose answers repeat much of their prompts: edits of code, and calls of tools that the prompt describes."""
ALL_DOMAINS = (*DOMAINS, *REPETITIVE)
HELD_OUT = 60
"""Prompts of each domain that no speculator of the benchmarks is trained on."""
SAMPLED = 0.8
"""Temperature of sampled requests."""


def read_prompts(domain: str) -> list[str]:
    """Return all prompts of a domain."""
    if domain not in ALL_DOMAINS:
        raise UserError(f"--domain {domain}: there are prompts of {', '.join(ALL_DOMAINS)}")
    return demo_prompts.read_prompts(domain, Path(__file__).parent if domain not in demo_prompts.DOMAINS else None)


def training_prompts(domain: str) -> list[str]:
    """Return the prompts that speculators may be trained on."""
    return read_prompts(domain)[:-HELD_OUT]


def held_out_prompts(domain: str) -> list[str]:
    """Return the prompts that benchmarks measure with."""
    return read_prompts(domain)[-HELD_OUT:]


def load_tokenizer(folder: Path) -> Any:
    """Load the target's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def read_end_tokens(folder: Path) -> frozenset[int]:
    """Return the tokens that end an output: from the generation settings, else from the configuration."""
    for name in ("generation_config.json", "config.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        if (ids := values.get("eos_token_id")) is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Tokenize each text as the only message of a conversation, as the HTTP API does."""
    return [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )
        for text in texts
    ]


def training_requests(
    domain: str, prompts_ids: Sequence[tuple[int, ...]], count: int, max_tokens: int
) -> list[Request]:
    """Return ``count`` requests over the prompts: each prompt once greedily, then again and again with sampling."""
    return [
        Request(
            id=f"{domain}-{i:05}",
            prompt=prompts_ids[i % len(prompts_ids)],
            max_tokens=max_tokens,
            temperature=SAMPLED if i >= len(prompts_ids) else 0.0,
            seed=i,
            label=domain,
        )
        for i in range(count)
    ]
