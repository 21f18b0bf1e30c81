"""Counts and latency percentiles of a load, as JSON and as a terminal table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.table import Table

from ops.loadgen.load import Load

_SHARES = (0.5, 0.9, 0.99)


def summarize_load(load: Load, requests: int, *, cut_short: bool = False) -> dict[str, Any]:
    """Return counts, rates and latencies in milliseconds; None where nothing was measured.

    Latencies are those of successful requests; lateness is that of every request of an open load.

    Args:
        load: A load that has ended.
        requests: How many requests it was meant to send.
        cut_short: Whether the user ended it early.
    """
    succeeded = [response for response in load.responses if response.error is None]
    failures = Counter(load.errors)
    tokens = sum(response.output_tokens for response in succeeded)
    return {
        "requests": requests,
        "sent": load.sent,
        "succeeded": len(succeeded),
        "failed": failures.total(),
        "failures": dict(failures.most_common()),
        "seconds": round(load.seconds, 3),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / load.seconds, 2) if load.seconds else None,
        "ttft_ms": _percentiles([one.text_times[0] - one.started for one in succeeded if one.text_times]),
        "itl_ms": _percentiles([b - a for one in succeeded for a, b in pairwise(one.text_times)]),
        "late_ms": _percentiles(load.lateness_s),
        "cut_short": cut_short,
    }


def build_table(summary: dict[str, Any]) -> Table:
    """Return the counts, then the latencies."""
    shares = [f"p{share * 100:g}" for share in _SHARES]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("", *shares, "max"):
        table.add_column(column, justify="right")
    cut_short = " (cut short)" if summary["cut_short"] else ""
    table.add_row(f"requests{cut_short}", f"{summary['sent']:,} of {summary['requests']:,}")
    table.add_row("succeeded", f"{summary['succeeded']:,}")
    table.add_row("failed", f"{summary['failed']:,}")
    for reason, count in summary["failures"].items():
        table.add_row(f"  {reason}", f"{count:,}")
    table.add_row("output tokens", f"{summary['output_tokens']:,}")
    table.add_row("output tokens/s", f"{summary['output_tokens_per_s'] or 0:,.1f}")
    for key, name in (
        ("ttft_ms", "time to first token, ms"),
        ("itl_ms", "inter-token latency, ms"),
        ("late_ms", "generator lateness, ms"),
    ):
        if (latencies := summary[key]) is not None:
            table.add_row(name, "", *(f"{latencies[share]:,.1f}" for share in (*shares, "max")))
    return table


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Return percentiles and maximum in milliseconds. A percentile is the nearest value above, not interpolated."""
    if not seconds:
        return None
    ordered = sorted(1000 * value for value in seconds)
    found = {f"p{share * 100:g}": ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in _SHARES}
    return {name: round(value, 2) for name, value in {**found, "max": ordered[-1]}.items()}
