"""Records of two synthetic demo runs: one with two swaps and a domain shift, and one that crashed."""

from __future__ import annotations

from dataclasses import replace

from ops.demo.comparison import Block, Trial
from ops.demo.record import DemoRun, LosslessResult, RowCounts, StackSample, Swap, VersionRecord
from ops.loadgen.load import Response

START = 1_800_000_000.0


def request(number: int, domain: str) -> Response:
    started, accepted = START + 20 + number, min(number, 50)
    return Response(
        id=f"r{number}",
        domain=domain,
        started=started,
        ended=started + 4,
        prompt="p",
        text="t",
        prompt_tokens=40,
        output_tokens=96,
        verify_steps=60,
        draft_tokens=180,
        accepted_tokens=accepted,
        suffix_accepted_tokens=accepted // 2,
        speculators=("day-0-head-0",),
    )


def trial(start: float, seconds: float, plain_seconds: float) -> Trial:
    """Return a trial of four requests with 480 tokens in each block."""
    spans = (start, start + seconds), (start + seconds + 1, start + seconds + 1 + plain_seconds)
    speculative, plain = (
        Block(tuple(replace(request(30, "code"), started=began, ended=ended, output_tokens=120) for _ in range(4)), 5.0)
        for began, ended in spans
    )
    return Trial(speculative, plain)


FIRST = trial(START + 20, 12, 10)
MEASURED = trial(START + 160, 6, 9)
RUN = DemoRun(
    started=START,
    ended=START + 300,
    requests=tuple(request(n, "math" if n < 60 else "code") for n in range(120)),
    first=(FIRST,),
    measured=(MEASURED, trial(START + 180, 6, 8)),
    other_programs=0.04,
    samples=tuple(StackSample(START + 20 + i, 30 * i, 2, i, 5 / (1 + i)) for i in range(130)),
    swaps=(Swap("1", START + 60.5, 6, 3.2), Swap("2", START + 110.5, 5, 2.9)),
    versions=(VersionRecord("1", START + 50, START + 55, START + 60.5, 0.31, 0.02), VersionRecord("2", START + 100)),
    rows=RowCounts(900, 890, 10, 0),
    lossless=LosslessResult(24, 2304, 0, 1),
)
EMPTY = DemoRun(started=START, ended=START + 5, crashed="stream died with code 1; read .aurora/logs/stream.log")
