"""Records of two synthetic demo runs: one with two swaps and a domain shift, and one that crashed."""

from __future__ import annotations

from ops.demo.record import DemoRun, LosslessResult, RowCounts, StackSample, Swap, VersionRecord
from ops.loadgen.load import Response

START = 1_800_000_000.0


def request(number: int, domain: str) -> Response:
    started = START + 20 + number
    return Response(
        f"r{number}", domain, started, started + 4, "p", "t", 40, 96, 60, 180, min(number, 50), ("day-0-head-0",)
    )


RUN = DemoRun(
    started=START,
    ended=START + 300,
    requests=tuple(request(n, "math" if n < 60 else "code") for n in range(120)),
    plain=tuple(request(150 + n, "code") for n in range(16)),
    samples=tuple(StackSample(START + 20 + i, 30 * i, 2, i, 5 / (1 + i)) for i in range(130)),
    swaps=(Swap("1", START + 60.5, 6, 3.2), Swap("2", START + 110.5, 5, 2.9)),
    versions=(VersionRecord("1", START + 50, START + 55, START + 60.5, 0.31, 0.02), VersionRecord("2", START + 100)),
    rows=RowCounts(900, 890, 10, 0),
    lossless=LosslessResult(24, 2304, 0, 1),
)
EMPTY = DemoRun(started=START, ended=START + 5, crashed="stream died with code 1; read .aurora/logs/stream.log")
