"""The inbox between Faust and the tables: parts of a size, and never more in memory than was said."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from pipeline.consumer import BufferLimits, RecordBuffer

SOON_S = 0.001
LONG_S = 600.0


def inbox(records: int = 4, part: int = 100, held: int = 200, within_s: float = SOON_S) -> RecordBuffer[int]:
    return RecordBuffer(BufferLimits(records, part, within_s, held))


async def fill(into: RecordBuffer[int], sizes: list[int]) -> None:
    for number, size in enumerate(sizes):
        await into.put(number, size)


@given(st.lists(st.integers(1, 250), max_size=30))
def test_everything_comes_out_once_in_its_order_and_no_more_than_the_bound_is_held(sizes: list[int]) -> None:
    async def scenario() -> None:
        box = inbox()
        filling = asyncio.create_task(fill(box, sizes))
        taken: list[int] = []
        while len(taken) < len(sizes):
            part = await box.take_batch()
            assert 0 < len(part) <= 4
            assert sum(sizes[i] for i in part[:-1]) < 100, "a part ends with the record that fills it"
            assert box.bytes <= max(200, *sizes)
            taken += part
        assert taken == list(range(len(sizes)))
        assert box.bytes == 0
        await filling

    asyncio.run(scenario())


def test_a_full_part_waits_for_nothing() -> None:
    async def scenario() -> None:
        by_number, by_size = inbox(within_s=LONG_S), inbox(within_s=LONG_S)
        await fill(by_number, [1, 1, 1, 1])
        await fill(by_size, [60, 60])
        assert await by_number.take_batch() == [0, 1, 2, 3]
        assert await by_size.take_batch() == [0, 1]

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_reader_waits_while_the_inbox_is_full_and_goes_on_when_a_part_was_taken() -> None:
    async def scenario() -> None:
        box = inbox(within_s=LONG_S)
        filling = asyncio.create_task(fill(box, [90, 90, 90]))
        await asyncio.sleep(0)
        assert box.bytes == 180
        assert not filling.done()
        assert await box.take_batch() == [0, 1]
        await filling
        assert box.bytes == 90

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_record_larger_than_the_bound_is_taken_alone() -> None:
    async def scenario() -> None:
        box = inbox()
        await box.put(0, 1_000)
        assert box.full
        assert await box.take_batch() == [0]

    asyncio.run(scenario())
