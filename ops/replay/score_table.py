"""A score at the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from trainer.replay.acceptance_figures import Interval
from trainer.replay.request_evaluation import RequestEvaluation


def tables(found: RequestEvaluation) -> list[Table]:
    """Every version in every group, and where there are several versions, the differences between them."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("requests of", "version"):
        shown.add_column(column, overflow="fold")
    for column in ("requests", "accepted tokens per step", "95 %", "everywhere", "by depth"):
        shown.add_column(column, justify="right", no_wrap=True)
    for group in found.groups:
        for i, named in enumerate(found.versions):
            one = found.figures(i, group)
            shown.add_row(
                *(group if i == 0 else "", named.short, f"{one.requests:,}", f"{one.accepted_per_step.value:.3f}"),
                *(bounds(one.accepted_per_step), f"{one.all_positions:.3f}"),
                " ".join(f"{share:.2f}" for share in one.by_depth),
            )
    return [shown, _differences(found)] if len(found.versions) > 1 else [shown]


def notes(found: RequestEvaluation) -> Iterator[str]:
    """What the figures leave out."""
    counts = found.counts
    state = ", ".join(f"{name} {version}" for name, version in found.tables.items())
    yield f"drafts of {found.lookahead} tokens; state of the tables: {state}"
    yield f"versions: {', '.join(map(str, found.versions))}"
    if left := counts.get("incomplete", 0):
        yield f"{left:,} requests left out: not whole in this state of the tables"
    if sampled := counts.get("tokens_sampled", 0):
        outside = counts.get("tokens_outside_top_k", 0)
        yield (
            f"sampled answers: expected figures; {outside:,} of {sampled:,} tokens were not among the target's "
            f"recorded ones, and count a little too low (traces.top_k)"
        )


def bounds(interval: Interval) -> str:
    """Where a figure lies."""
    return f"{interval.low:.3f} - {interval.high:.3f}"


def _differences(found: RequestEvaluation) -> Table:
    shown = Table(
        box=None, pad_edge=False, header_style="bold", title="accepted tokens per step, paired", title_justify="left"
    )
    for column in ("requests of", "version", "against"):
        shown.add_column(column, overflow="fold")
    for column in ("difference", "95 %"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("")
    for group in found.groups:
        for (later, earlier), of_two in found.differences(group).items():
            names = found.versions[later].short, found.versions[earlier].short
            verdict = "" if of_two.is_clear else "may be chance"
            shown.add_row(group, *names, f"{of_two.value:+.3f}", f"{of_two.low:+.3f} to {of_two.high:+.3f}", verdict)
    return shown
