"""Requests of a soak: greedy and sampled, of many lengths, some with a client that disconnects early."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

from ops.bench import prompts
from ops.loadgen.load import Prompt, Request, chat_request

TIMEOUT_S = 300.0
_SHORTEST, _LONGEST = 8, 96
_LATEST_DISCONNECT = 24


def soak_requests(model: str, leaving: float, seed: int = 0) -> Iterator[Request]:
    """Yield requests without end.

    Args:
        model: Name of the served model.
        leaving: Share of the requests whose client disconnects before the end of the response.
        seed: Seed of the order of the prompts and of the settings of each request.
    """
    texts = [Prompt(domain, text) for domain in prompts.DOMAINS for text in prompts.read_prompts(domain)]
    random.Random(seed).shuffle(texts)  # noqa: S311
    for number in count():
        chance = random.Random(f"{seed}/{number}")  # noqa: S311
        max_tokens, temperature = chance.randint(_SHORTEST, _LONGEST), chance.choice((0.0, prompts.SAMPLED))
        disconnect_after = chance.randint(1, _LATEST_DISCONNECT) if chance.random() < leaving else None
        prompt = texts[number % len(texts)]
        yield chat_request(model, prompt, max_tokens, temperature=temperature, disconnect_after=disconnect_after)
