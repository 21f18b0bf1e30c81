"""Dashboard of the whole loop: serving, stream, training, versions.

``python -m ops.deploy.monitoring.dashboards.loop`` writes ``loop.json``.
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
class Query:
    """A PromQL query and the legend of its series."""

    promql: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel with time series."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    signed: bool = False
    """Whether the axis shows values below zero."""


def _rate(counter: str, by: str = "") -> str:
    """Return the rate per second, summed by a label; zero before the first increment."""
    grouped = f" by ({by})" if by else ""
    rate = f"sum{grouped} (rate({counter}_total[{_INTERVAL}]))"
    return f"{rate} or vector(0)" if by else rate


def _quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, sum by (le) (rate({histogram}_bucket[{_INTERVAL}])))"


def _ratio(numerator: str, denominator: str) -> str:
    """Return the ratio of two counters' rates, by node."""
    return " / ".join(f"sum by (instance) (rate({name}_total[{_INTERVAL}]))" for name in (numerator, denominator))


ROWS: dict[str, tuple[Panel, ...]] = {
    "Serving": (
        Panel(
            "Output tokens per second",
            "Measured rate of each node, and the rate it expects without drafting. If the measured rate is lower, "
            "drafting costs more than it saves.",
            (
                Query(f"sum by (instance) (rate(aurora_serve_output_tokens_total[{_INTERVAL}]))", "{{instance}}"),
                Query(
                    'aurora_serve_expected_tokens_per_second{draft_depth="0"}',
                    "{{instance}}, expected without drafting",
                ),
            ),
        ),
        Panel(
            "Speed-up by drafts",
            "Output rate of decoding over the rate without drafts, as the planner expects it: 1 is no gain. By node "
            "over recent verify steps, and of the fleet over the interval.",
            (
                Query("aurora_serve_speculation_speedup_ratio", "{{instance}}"),
                Query(
                    f"sum (rate(aurora_serve_undrafted_decoding_seconds_total[{_INTERVAL}])) / "
                    f"sum (rate(aurora_serve_decoding_seconds_total[{_INTERVAL}]))",
                    "fleet",
                ),
            ),
            "x",
        ),
        Panel(
            "Time saved",
            "Seconds of decoding that drafts have saved since the nodes started; it falls while they cost time.",
            (
                Query(
                    "aurora_serve_undrafted_decoding_seconds_total - aurora_serve_decoding_seconds_total",
                    "{{instance}}",
                ),
            ),
            "s",
            signed=True,
        ),
        Panel(
            "Acceptance length",
            "Tokens per verify step: 1 + accepted tokens per step (bonus token included); and 1 + those that only the "
            "suffix drafter proposed.",
            (
                Query(
                    f"1 + {_ratio('aurora_serve_accepted_tokens', 'aurora_serve_verify_steps')}",
                    "{{instance}}",
                ),
                Query(
                    f"1 + {_ratio('aurora_serve_suffix_accepted_tokens', 'aurora_serve_verify_steps')}",
                    "{{instance}}, suffix drafter",
                ),
            ),
        ),
        Panel(
            "Draft depth",
            "Draft tokens of the speculator per request and verify step along the deepest path; 0 while its drafts do "
            "not pay.",
            (Query("aurora_serve_draft_depth", "{{instance}}"),),
        ),
        Panel(
            "Requests",
            "Choices that finished, by outcome, and the requests that run and wait.",
            (
                Query(_rate("aurora_serve_requests", "outcome"), "{{outcome}} per second"),
                Query("sum (aurora_serve_requests_running)", "running"),
                Query("sum (aurora_serve_requests_waiting)", "waiting"),
            ),
        ),
        Panel(
            "Prefix cache",
            "Prompt tokens that came from the prefix cache and were not read again, and the cache's size.",
            (
                Query(_rate("aurora_serve_prompt_tokens_cached"), "cached prompt tokens per second"),
                Query(_rate("aurora_serve_prefix_cache_evictions"), "evicted blocks per second"),
                Query("sum (aurora_serve_prefix_cache_bytes) / 1048576", "MiB"),
            ),
        ),
        Panel(
            "Time in the queue",
            "From the arrival of a request to its slot.",
            (
                Query(_quantile(0.5, "aurora_serve_request_queue_time_seconds"), "p50"),
                Query(_quantile(0.99, "aurora_serve_request_queue_time_seconds"), "p99"),
            ),
            "s",
        ),
        Panel(
            "Time to first token",
            "From the arrival of a request to its first token.",
            (
                Query(_quantile(0.5, "aurora_serve_time_to_first_token_seconds"), "p50"),
                Query(_quantile(0.99, "aurora_serve_time_to_first_token_seconds"), "p99"),
            ),
            "s",
        ),
        Panel(
            "Inter-token latency",
            "Of each output token after the first. The tokens of a verify step share its time equally.",
            (
                Query(_quantile(0.5, "aurora_serve_inter_token_latency_seconds"), "p50"),
                Query(_quantile(0.99, "aurora_serve_inter_token_latency_seconds"), "p99"),
            ),
            "s",
        ),
        Panel(
            "End-to-end request latency",
            "From the arrival of a request to its last token.",
            (
                Query(_quantile(0.5, "aurora_serve_e2e_request_latency_seconds"), "p50"),
                Query(_quantile(0.99, "aurora_serve_e2e_request_latency_seconds"), "p99"),
            ),
            "s",
        ),
    ),
    "From traces to tables": (
        Panel(
            "Verify steps",
            "Trace rows that nodes captured, published and dropped, and rows that the stream wrote to the tables.",
            (
                Query(_rate("aurora_serve_trace_rows_captured"), "captured"),
                Query(_rate("aurora_serve_trace_rows_published"), "published"),
                Query(_rate("aurora_serve_trace_rows_dropped", "reason"), "dropped, {{reason}}"),
                Query(_rate("aurora_stream_rows_written"), "written"),
            ),
        ),
        Panel(
            "Lag of the tables",
            "Records on the broker that the tables do not contain, and how long a partition has made no progress.",
            (
                Query("sum by (partition) (aurora_stream_lag_records)", "records of partition {{partition}}"),
                Query("max (aurora_stream_partition_stalled_seconds)", "stalled, s"),
                Query("max (aurora_stream_partition_transaction_seconds)", "open transaction, s"),
            ),
        ),
        Panel(
            "Age of the oldest unread record",
            "Since the broker received it. At 75 % of kafka.retention an alert pages.",
            (
                Query(
                    "time() - min by (partition) (aurora_stream_oldest_unread_timestamp_seconds)",
                    "partition {{partition}}",
                ),
            ),
            "s",
        ),
        Panel(
            "Time from the broker to the tables",
            "Of each record, and of the commits within it.",
            (
                Query(_quantile(0.5, "aurora_stream_record_delay_seconds"), "record, p50"),
                Query(_quantile(0.99, "aurora_stream_record_delay_seconds"), "record, p99"),
                Query(_quantile(0.5, "aurora_stream_commit_duration_seconds"), "commit, p50"),
                Query(_quantile(0.99, "aurora_stream_commit_duration_seconds"), "commit, p99"),
            ),
            "s",
        ),
        Panel(
            "Rejected records and failed commits",
            "Dead letters by reason, records lost to retention, holes, and commits that were fenced or failed.",
            (
                Query(_rate("aurora_stream_dead_letters", "reason"), "dead letters, {{reason}}"),
                Query(_rate("aurora_stream_records_lost"), "lost to retention"),
                Query(_rate("aurora_stream_hole_offsets"), "offsets in holes"),
                Query(_rate("aurora_stream_commits_fenced"), "fenced"),
                Query(_rate("aurora_stream_table_errors"), "table errors"),
            ),
        ),
        Panel(
            "First-token acceptance by version and label",
            "Ratio of verify steps whose first draft token was accepted, since the last drift.",
            (Query("aurora_stream_first_token_acceptance_ratio", "version {{speculator}} {{label}}"),),
            "percentunit",
        ),
        Panel(
            "Drift",
            "Detected changes of acceptance.",
            (Query(f"sum (increase(aurora_stream_drift_events_total[{_INTERVAL}]))", "events"),),
        ),
        Panel(
            "Health",
            "1 for engines that run, workers that make progress and processes that are ready. Circuit breakers: 0 "
            "closed, 1 half open, 2 open.",
            (
                Query("aurora_serve_engine_up", "engine of {{instance}}"),
                Query("aurora_stream_live", "worker {{instance}}"),
                Query("aurora_serve_ready", "node {{instance}} ready"),
                Query("aurora_stream_ready", "worker {{instance}} ready"),
                Query("aurora_train_ready", "trainer ready"),
                Query("aurora_promoter_ready", "promoter ready"),
                Query("aurora_serve_trace_circuit_breaker_state", "circuit breaker of {{instance}}"),
            ),
        ),
    ),
    "Training": (
        Panel("Loss", "Of the last training step, by term.", (Query("aurora_train_loss", "{{term}}"),)),
        Panel(
            "Loss by TTT step",
            "Mean divergence from the target's distribution at each step of the training-time test.",
            (Query("aurora_train_ttt_step_loss", "TTT step {{step}}"),),
        ),
        Panel(
            "Acceptance length on the held-out set",
            "Simulated on samples that are not trained on while they are held out; bonus token included.",
            (Query("aurora_train_acceptance_length", "in training"),),
        ),
        Panel(
            "Tokens per second",
            "Tokens that training processes, replay and idle time included.",
            (Query("aurora_train_tokens_per_second", "{{instance}}"),),
        ),
        Panel(
            "Lag of training",
            "Commits that are not read, samples that wait for training, and the age of the newest sample that a "
            "step used.",
            (
                Query("aurora_train_lag_commits", "commits"),
                Query("aurora_train_samples_waiting", "samples"),
                Query("time() - aurora_train_newest_sample_timestamp_seconds", "age of the newest, s"),
            ),
        ),
        Panel(
            "Skipped steps and rollbacks",
            "Training steps without a finite loss or gradient, and restores of the last good checkpoint.",
            (
                Query(f"sum (increase(aurora_train_steps_skipped_total[{_INTERVAL}]))", "skipped steps"),
                Query(f"sum (increase(aurora_train_divergence_rollbacks_total[{_INTERVAL}]))", "rollbacks"),
            ),
        ),
    ),
    "Versions": (
        Panel(
            "Versions",
            "Registered by the trainer, swapped in and rejected by nodes, since each process started.",
            (
                Query("sum (aurora_train_versions_registered_total)", "registered"),
                Query("sum by (instance) (aurora_serve_version_swaps_total)", "swapped in by {{instance}}"),
                Query("sum by (instance) (aurora_serve_versions_rejected_total)", "rejected by {{instance}}"),
            ),
        ),
        Panel(
            "Evaluations without a version",
            "Evaluations on the held-out set since the trainer last registered a version: a line that grows for hours "
            "is a draft that does not improve.",
            (Query("aurora_train_evaluations_since_registration", "{{instance}}"),),
        ),
        Panel(
            "Coverage of the draft vocabulary",
            "Share of the output tokens that the draft in training can propose. Below train.draft_vocab_min_coverage "
            "the trainer changes the vocabulary, if another one covers clearly more.",
            (Query("aurora_train_draft_vocab_coverage_ratio", "{{instance}}"),),
            "percentunit",
        ),
        Panel(
            "Alias moves and rollbacks",
            "Recorded alias moves, and versions that the promoter rolled back, by alias.",
            (
                Query("sum by (alias) (aurora_promoter_alias_moves_total) or vector(0)", "moves of {{alias}}"),
                Query("sum by (alias) (aurora_promoter_rollbacks_total)", "rollbacks as {{alias}}"),
            ),
        ),
        Panel(
            "Canary analysis and post-promotion watch",
            "Relative difference of the new version against the version it is compared with, on live traffic.",
            (Query("aurora_promoter_canary_difference_ratio", "{{kind}}, {{figure}}"),),
            "percentunit",
            signed=True,
        ),
        Panel(
            "Failed calls",
            "To registry, broker and tables; processes retry them.",
            (
                Query(_rate("aurora_train_errors", "part"), "trainer, {{part}}"),
                Query(_rate("aurora_promoter_errors", "part"), "promoter, {{part}}"),
                Query(_rate("aurora_serve_registry_errors", "instance"), "registry, {{instance}}"),
            ),
        ),
    ),
}

ANNOTATIONS = {
    "swap": ("changes(aurora_serve_version_swaps_total[1m]) > 0", "green"),
    "drift": ("increase(aurora_stream_drift_events_total[1m]) > 0", "orange"),
    "training rollback": ("increase(aurora_train_divergence_rollbacks_total[1m]) > 0", "red"),
    "version rollback": ("increase(aurora_promoter_rollbacks_total[1m]) > 0", "purple"),
}
"""Moments that every panel marks: the query that is true at the moment, and the colour."""


def build() -> str:
    """Return the dashboard as JSON."""
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
    for row, panels in ROWS.items():
        board = board.with_row(dashboard.Row(row))
        for panel in panels:
            board = board.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _panel(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .datasource(_source())
        .span(_WIDTH)
        .height(_HEIGHT)
        .unit(panel.unit)
        .fill_opacity(8)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if not panel.signed:
        built = built.min(0)
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        built = built.with_target(prometheus.Dataquery().expr(query.promql).legend_format(query.legend).ref_id(letter))
    return built


def _annotation(name: str, query: str, colour: str) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery().name(name).datasource(_source()).enable(enable=True).expr(query).icon_color(colour)
    )


def _source() -> DataSourceRef:
    return DataSourceRef(type_val="prometheus", uid=_SOURCE)


def queries() -> Sequence[str]:
    """Return every query of every panel."""
    return [query.promql for panels in ROWS.values() for panel in panels for query in panel.queries]


if __name__ == "__main__":
    FILE.write_text(build())
    sys.stdout.write(f"{FILE}: {sum(map(len, ROWS.values()))} panels\n")
