"""A load test at the terminal. Pure."""

from __future__ import annotations

from rich.table import Table

from ops.loadgen.replay_load import SHARES, Outcome


def table(outcome: Outcome) -> Table:
    """Counts first, then times."""
    told = outcome.summary()
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("")
    names = [f"p{share * 100:g}" for share in SHARES]
    for column in ("", *names, "most"):
        shown.add_column(column, justify="right")
    cut = " (cut short)" if outcome.cut_short else ""
    shown.add_row(f"requests{cut}", f"{told['sent']:,} of {told['requests']:,}")
    shown.add_row("answered", f"{told['answered']:,}")
    shown.add_row("failed", f"{told['failed']:,}")
    for why, number in told["failures"].items():
        shown.add_row(f"  {why}", f"{number:,}")
    shown.add_row("output tokens", f"{told['output_tokens']:,}")
    shown.add_row("output tokens/s", f"{told['output_tokens_per_s'] or 0:,.1f}")
    for key, name in (
        ("ttft_ms", "first piece, ms"),
        ("itl_ms", "between pieces, ms"),
        ("late_ms", "generator late, ms"),
    ):
        if (times := told[key]) is not None:
            shown.add_row(name, "", *(f"{times[share]:,.1f}" for share in (*names, "most")))
    return shown
