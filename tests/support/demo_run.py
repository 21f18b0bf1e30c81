"""The record of a made-up demo: a draft that learns, two swaps, a change of domain; and one of a run that crashed."""

from __future__ import annotations

from ops.demo.record import Answered, Lossless, Rows, Run, Sample, Swap, Version

START = 1_800_000_000.0


def request(number: int, domain: str) -> Answered:
    begun = START + 20 + number
    return Answered(
        f"r{number}", domain, begun, begun + 4, "p", "t", 40, 96, 60, 180, min(number, 50), ("day-0-head-0",)
    )


RUN = Run(
    started=START,
    ended=START + 300,
    requests=tuple(request(n, "math" if n < 60 else "code") for n in range(120)),
    plain=tuple(request(150 + n, "code") for n in range(16)),
    samples=tuple(Sample(START + 20 + i, 30 * i, 2, i, 5 / (1 + i)) for i in range(130)),
    swaps=(Swap("1", START + 60.5, 6, 3.2), Swap("2", START + 110.5, 5, 2.9)),
    versions=(Version("1", START + 50, START + 55, START + 60.5, 0.31, 0.02), Version("2", START + 100)),
    rows=Rows(900, 890, 10, 0),
    lossless=Lossless(24, 2304, 0, 1),
)
EMPTY = Run(started=START, ended=START + 5, crashed="stream died with code 1; read .aurora/logs/stream.log")
