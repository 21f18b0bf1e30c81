"""Requests made of the vendored prompts, tokenized as the API tokenizes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ops import prompts
from schemas.errors import UserError
from serving.engines.base import Request

HELD_OUT = 60
"""Prompts at the end of each domain that no speculator of the benchmarks is trained on."""

SAMPLED = 0.8
"""Temperature of sampled requests."""


def learned_from(domain: str) -> list[str]:
    """Prompts that speculators may be trained on.

    Raises:
        UserError: no such domain.
    """
    return _read(domain)[:-HELD_OUT]


def held_out(domain: str) -> list[str]:
    """Prompts that are only ever measured with.

    Raises:
        UserError: no such domain.
    """
    return _read(domain)[-HELD_OUT:]


def tokenizer_of(folder: Path) -> Any:
    """The target's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def end_tokens(folder: Path) -> frozenset[int]:
    """Tokens that end an answer, from the generation settings where there are any, else from the configuration."""
    for name in ("generation_config.json", "config.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        if (ids := values.get("eos_token_id")) is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Each text as the only message of a conversation."""
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
    """``count`` requests over the prompts: first each one greedily, then verify step again with other, sampled
    answers.
    """
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


def _read(domain: str) -> list[str]:
    if domain not in prompts.DOMAINS:
        raise UserError(f"--domain {domain}: there are prompts of {', '.join(prompts.DOMAINS)}")
    return prompts.read(domain)
