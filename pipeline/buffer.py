"""What was read and waits for the tables, bounded in bytes: while they are slow, reading waits and memory is flat."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """When a part is handed out, and how much may wait."""

    part_records: int
    part_bytes: int
    within_s: float
    """A part is handed out when its first item has waited this long, however small it is."""
    held_bytes: int
    """What may wait; a single item may be larger."""


class Inbox(Generic[T]):
    """A queue from one task that reads to one that takes parts. To be used on one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._items: deque[tuple[T, int, float]] = deque()
        self._bytes = 0
        self._some = asyncio.Event()
        self._enough = asyncio.Event()
        self._room = asyncio.Event()

    @property
    def bytes(self) -> int:
        """What waits."""
        return self._bytes

    @property
    def full(self) -> bool:
        """Whether the next item may have to wait: reading stands still because taking does."""
        return self._bytes >= self._limits.held_bytes

    async def put(self, item: T, size: int) -> None:
        """Add an item of so many bytes, as soon as there is room for it."""
        while self._items and self._bytes + size > self._limits.held_bytes:
            self._enough.set()
            self._room.clear()
            await self._room.wait()
        self._items.append((item, size, time.monotonic()))
        self._bytes += size
        self._some.set()
        if len(self._items) >= self._limits.part_records or self._bytes >= self._limits.part_bytes:
            self._enough.set()

    async def take(self) -> list[T]:
        """The oldest items: a part that is full, or what there is when the first item has waited long enough."""
        await self._some.wait()
        _, _, since = self._items[0]
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, since + self._limits.within_s - time.monotonic())):
                await self._enough.wait()
        part: list[T] = []
        size = 0
        while self._items and len(part) < self._limits.part_records and size < self._limits.part_bytes:
            item, of_item, _ = self._items.popleft()
            part.append(item)
            size += of_item
        self._bytes -= size
        if not self._items:
            self._some.clear()
        if len(self._items) < self._limits.part_records and self._bytes < self._limits.part_bytes:
            self._enough.clear()
        self._room.set()
        return part
