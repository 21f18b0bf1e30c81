"""The loop on one page: serving, stream, learning, versions. ``python -m ops.deploy.monitoring.dashboards.loop``
writes ``loop.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef

FILE = Path(__file__).parent / "loop.json"
_SOURCE = "${source}"
_INTERVAL = "$__rate_interval"
_WIDTH, _HEIGHT = 8, 8


@dataclass(frozen=True, slots=True)
class Curve:
    """A query in PromQL, and what its curves are called."""

    query: str
    name: str


@dataclass(frozen=True, slots=True)
class Picture:
    """One panel."""

    title: str
    about: str
    curves: tuple[Curve, ...]
    unit: str = "short"


def _rate(counter: str, by: str = "") -> str:
    """Per second; zero where nothing of it was counted yet."""
    grouped = f" by ({by})" if by else ""
    rate = f"sum{grouped} (rate({counter}_total[{_INTERVAL}]))"
    return f"{rate} or vector(0)" if by else rate


def _quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, sum by (le) (rate({histogram}_bucket[{_INTERVAL}])))"


ROWS: dict[str, tuple[Picture, ...]] = {
    "Serving": (
        Picture(
            "Output tokens per second",
            "What the nodes give, beside what each expects of its target alone: below it, drafting costs more than it "
            "gives.",
            (
                Curve(f"sum by (instance) (rate(aurora_serve_output_tokens_total[{_INTERVAL}]))", "{{instance}}"),
                Curve(
                    'aurora_serve_expected_tokens_per_second{drafted="0"}', "{{instance}}, expected without drafting"
                ),
            ),
        ),
        Picture(
            "Accepted tokens per step",
            "Drafted tokens that the target keeps in a verify step; the bonus token is not in it.",
            (
                Curve(
                    f"sum by (instance) (rate(aurora_serve_accepted_tokens_total[{_INTERVAL}])) / "
                    f"sum by (instance) (rate(aurora_serve_verify_steps_total[{_INTERVAL}]))",
                    "{{instance}}",
                ),
            ),
        ),
        Picture(
            "Draft depth",
            "Tokens that a node drafts for a request, one after the other; 0 while drafting does not pay.",
            (Curve("aurora_serve_draft_depth", "{{instance}}"),),
        ),
        Picture(
            "Requests",
            "Choices of requests that ended, by outcome, and how many run and wait.",
            (
                Curve(_rate("aurora_serve_requests", "outcome"), "{{outcome}} a second"),
                Curve("sum (aurora_serve_running)", "running"),
                Curve("sum (aurora_serve_waiting)", "waiting"),
            ),
        ),
        Picture(
            "Time to the first token",
            "From the request to its first token.",
            (
                Curve(_quantile(0.5, "aurora_serve_first_token_seconds"), "p50"),
                Curve(_quantile(0.99, "aurora_serve_first_token_seconds"), "p99"),
            ),
            "s",
        ),
        Picture(
            "Time between tokens",
            "Of each output token after the first; a verify step's time is shared by its tokens.",
            (
                Curve(_quantile(0.5, "aurora_serve_between_tokens_seconds"), "p50"),
                Curve(_quantile(0.99, "aurora_serve_between_tokens_seconds"), "p99"),
            ),
            "s",
        ),
    ),
    "From traces to tables": (
        Picture(
            "VerifySteps",
            "Verify steps that nodes handed over, that the broker acknowledged, and that were given up.",
            (
                Curve(_rate("aurora_serve_trace_rows_captured"), "captured"),
                Curve(_rate("aurora_serve_trace_rows_published"), "published"),
                Curve(_rate("aurora_serve_trace_rows_shed", "reason"), "shed {{reason}}"),
                Curve(_rate("aurora_stream_rows_written"), "written"),
            ),
        ),
        Picture(
            "Behind",
            "Records that the tables lack, and for how long some have waited while none arrived.",
            (
                Curve("sum by (partition) (aurora_stream_lag_records)", "records of partition {{partition}}"),
                Curve("max (aurora_stream_waiting_seconds)", "waiting, s"),
            ),
        ),
        Picture(
            "Records that could not be used",
            "Dead letters by reason, records that the log lost, and commits that were refused or failed.",
            (
                Curve(_rate("aurora_stream_dead_letters", "reason"), "dead {{reason}}"),
                Curve(_rate("aurora_stream_lost"), "lost"),
                Curve(_rate("aurora_stream_fenced"), "fenced"),
                Curve(_rate("aurora_stream_table_errors"), "table errors"),
            ),
        ),
        Picture(
            "Acceptance by version and traffic",
            "Share of the verify steps in which the first drafted token was accepted, since the last drift.",
            (Curve("aurora_stream_first_token_acceptance_ratio", "version {{speculator}} {{label}}"),),
            "percentunit",
        ),
        Picture(
            "Drift",
            "Changes of acceptance that were noticed.",
            (Curve(f"sum (increase(aurora_stream_drift_events_total[{_INTERVAL}]))", "events"),),
        ),
        Picture(
            "Health",
            "1 where all is well: engines that run, workers that make progress; breakers are 2 while a node cannot "
            "publish.",
            (
                Curve("aurora_serve_alive", "engine of {{instance}}"),
                Curve("aurora_stream_live", "worker {{instance}}"),
                Curve("aurora_serve_trace_breaker", "breaker of {{instance}}"),
            ),
        ),
    ),
    "Learning": (
        Picture("Loss", "Of the last step, by term.", (Curve("aurora_train_loss", "{{term}}"),)),
        Picture(
            "Loss by step of the unrolled draft",
            "Mean divergence from the target's distribution after so many drafted tokens.",
            (Curve("aurora_train_step_loss", "step {{step}}"),),
        ),
        Picture(
            "Accepted tokens per step, held out",
            "Simulated on requests that are never trained on; bonus excluded.",
            (Curve("aurora_train_accepted_per_step", "in training"),),
        ),
        Picture(
            "Tokens per second",
            "Tokens that training passes over, replay and waiting included.",
            (Curve("aurora_train_tokens_per_second", "{{instance}}"),),
        ),
        Picture(
            "Behind the tables",
            "Commits that are not read, windows that are not learned from, and the age of the newest one that is.",
            (
                Curve("aurora_train_lag_commits", "commits"),
                Curve("aurora_train_windows_waiting", "windows"),
                Curve("aurora_train_newest_window_age_seconds", "age of the newest, s"),
            ),
        ),
        Picture(
            "Steps gone wrong",
            "Steps that were not taken, and returns to the last good state.",
            (
                Curve(f"sum (increase(aurora_train_unfit_steps_total[{_INTERVAL}]))", "not taken"),
                Curve(f"sum (increase(aurora_train_rollbacks_total[{_INTERVAL}]))", "went back"),
            ),
        ),
    ),
    "Versions": (
        Picture(
            "Versions",
            "Registered by the trainer, swapped in and refused by nodes, since each began.",
            (
                Curve("sum (aurora_train_registered_total)", "registered"),
                Curve("sum by (instance) (aurora_serve_swaps_total)", "swapped in by {{instance}}"),
                Curve("sum by (instance) (aurora_serve_refused_total)", "refused by {{instance}}"),
            ),
        ),
        Picture(
            "Alias moves",
            "Recorded by the promoter.",
            (Curve("sum by (alias) (aurora_promoter_alias_moves_total) or vector(0)", "{{alias}}"),),
        ),
        Picture(
            "Failed calls",
            "To registry, broker and tables, which are tried again.",
            (
                Curve(_rate("aurora_train_errors", "part"), "trainer, {{part}}"),
                Curve(_rate("aurora_promoter_errors", "part"), "promoter, {{part}}"),
                Curve(_rate("aurora_serve_registry_failures", "instance"), "registry, {{instance}}"),
            ),
        ),
    ),
}

ANNOTATIONS = {
    "swap": ("changes(aurora_serve_swaps_total[1m]) > 0", "green"),
    "drift": ("increase(aurora_stream_drift_events_total[1m]) > 0", "orange"),
    "training went back": ("increase(aurora_train_rollbacks_total[1m]) > 0", "red"),
}
"""Moments that are marked in every picture, by the query that is true then, with a colour."""


def build() -> str:
    """The dashboard as JSON."""
    board = (
        dashboard.Dashboard("Aurora: the loop")
        .uid("aurora-loop")
        .tags(["aurora"])
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    )
    for name, (query, colour) in ANNOTATIONS.items():
        board = board.annotation(_annotation(name, query, colour))
    for row, pictures in ROWS.items():
        board = board.with_row(dashboard.Row(row))
        for picture in pictures:
            board = board.with_panel(_panel(picture))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _panel(picture: Picture) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(picture.title)
        .description(picture.about)
        .datasource(_source())
        .span(_WIDTH)
        .height(_HEIGHT)
        .unit(picture.unit)
        .min(0)
        .fill_opacity(8)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    for letter, curve in zip("ABCDEFGH", picture.curves, strict=False):
        query = prometheus.Dataquery().expr(curve.query).legend_format(curve.name).ref_id(letter)
        panel = panel.with_target(query)
    return panel


def _annotation(name: str, query: str, colour: str) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery().name(name).datasource(_source()).enable(enable=True).expr(query).icon_color(colour)
    )


def _source() -> DataSourceRef:
    return DataSourceRef(type_val="prometheus", uid=_SOURCE)


def queries() -> Sequence[str]:
    """Every query of every picture."""
    return [curve.query for pictures in ROWS.values() for picture in pictures for curve in picture.curves]


if __name__ == "__main__":
    FILE.write_text(build())
    sys.stdout.write(f"{FILE}: {sum(len(pictures) for pictures in ROWS.values())} panels\n")
