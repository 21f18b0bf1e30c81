"""Traffic of a campaign: chunks of many verify steps, some of them faulty on the way to the broker."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from bfloat16 import to_bf16
from stream_worker import Publisher

from schemas.trace.record import ROOT, Chunk, Envelope, VerifyStep, encode

VERIFY_STEPS = 80
"""Verify steps of a chunk."""
CHUNKS = 3
"""Chunks of a request."""
WIDTH, TOP_K = 8, 2
TEMPLATES = 16
"""Requests with different tokens. Further requests repeat them under another id."""
MESSAGE_FAULTS = ("truncated", "flipped", "duplicated", "reordered")
DAY_MS = 86_400_000

Clock = Sequence[int]
"""Offsets of the clocks of the nodes, in milliseconds."""


class Traffic:
    """Sends one request after the other. ``message_faults`` counts the faulty messages.

    A message is cut (``truncated``), gets a bit flipped (``flipped``), is sent again some requests later
    (``duplicated``), or is swapped with the next chunk of its request (``reordered``). The ledger holds the expected
    result: the first three become dead letters, and a reordered message becomes rows.
    """

    def __init__(self, publisher: Publisher, fault_ratio: float, clocks: Clock = (0,), seed: int = 0) -> None:
        self.publisher = publisher
        self.message_faults: Counter[str] = Counter(dict.fromkeys(MESSAGE_FAULTS, 0))
        self._share = fault_ratio
        self._clocks = clocks
        self._rng = np.random.default_rng(seed)
        self._templates = [request(self._rng) for _ in range(TEMPLATES)]
        self._sent = 0
        self._again: list[tuple[Chunk, bytes, int]] = []

    def send_request(self) -> None:
        """Send the chunks of another request."""
        number, rng = self._sent, self._rng
        self._sent += 1
        node = number % len(self._clocks)
        time_ms = time.time_ns() // 1_000_000 + self._clocks[node]
        chunks = self._chunks(number, f"node-{node}", time_ms)
        for i in range(CHUNKS - 1):
            if self._has_fault("reordered"):
                chunks[i], chunks[i + 1] = chunks[i + 1], chunks[i]
        for chunk in chunks:
            value, reason = encode(chunk), ""
            if self._has_fault("truncated"):
                value = value[: int(rng.integers(len(value)))]
                # Every message ends with a checksum of eight bytes. A shorter one has no checksum.
                reason = "truncated" if len(value) <= 8 else "corrupt"
            elif self._has_fault("flipped"):
                flipped = bytearray(value)
                flipped[int(rng.integers(len(value)))] ^= 1 << int(rng.integers(8))
                value, reason = bytes(flipped), "corrupt"
            elif self._has_fault("duplicated"):
                self._again.append((chunk, value, time_ms))
            self.publisher.send(chunk, value, reason, time_ms)
        if len(self._again) > 3 * rng.random():
            self._send_again()

    def close(self) -> None:
        """Send pending duplicates, and wait until the broker has acknowledged everything."""
        while self._again:
            self._send_again()
        self.publisher.flush()

    def _send_again(self) -> None:
        chunk, value, time_ms = self._again.pop(0)
        self.publisher.send(chunk, value, "duplicate", time_ms)

    def _has_fault(self, how: str) -> bool:
        is_faulty = bool(self._rng.random() < self._share / len(MESSAGE_FAULTS))
        self.message_faults[how] += is_faulty
        return is_faulty

    def _chunks(self, number: int, node: str, time_ms: int) -> list[Chunk]:
        envelope = Envelope(
            request=f"request-{number}",
            chunk=0,
            last=False,
            node=node,
            target="target",
            line="line",
            features="inline",
            feature_width=WIDTH,
            top_k=TOP_K,
            temperature=0.5,
            top_p=0.75,
            seed=number,
            label="odd" if number % 2 else None,
        )
        chunks = []
        for i, verify_steps in enumerate(self._templates[number % TEMPLATES]):
            last = i == CHUNKS - 1
            named = replace(envelope, chunk=i, last=last, finish="stop" if last else None)
            ended = replace(verify_steps[-1], time_us=time_ms * 1000 + i)
            chunks.append(Chunk(named, (*verify_steps[:-1], ended)))
        return chunks


def request(rng: np.random.Generator) -> list[list[VerifyStep]]:
    """Return the verify steps of a request with drafted chains, split into chunks."""
    verify_steps: list[VerifyStep] = []
    position, root = 0, 0
    for number in range(VERIFY_STEPS * CHUNKS):
        drafted = tuple(map(int, rng.integers(0, 999, 3))) if number else ()
        accepted = int(rng.integers(0, 4)) if number else 0
        tokens = (root, *drafted[:accepted]) if number else tuple(map(int, rng.integers(0, 999, 9)))
        root = int(rng.integers(0, 999))
        verified = 1 + len(drafted)
        verify_steps.append(
            VerifyStep(
                verify_step=number,
                position=position,
                tokens=tokens,
                features=to_bf16(rng.standard_normal((len(tokens), WIDTH)).astype(np.float32)),
                draft_tokens=drafted,
                draft_parents=tuple(range(ROOT, len(drafted) - 1)),
                draft_logprobs=tuple(-rng.random(len(drafted))),
                accepted=tuple(range(accepted)),
                bonus=root,
                top_ids=rng.integers(0, 999, (verified, TOP_K), dtype=np.int32),
                top_logprobs=-rng.random((verified, TOP_K), dtype=np.float32),
                speculator="3" if number else "",
                draft_us=number,
                verify_us=2,
                time_us=1_700_000_000_000_000 + number,
            )
        )
        position += len(tokens)
    return [verify_steps[i : i + VERIFY_STEPS] for i in range(0, len(verify_steps), VERIFY_STEPS)]
