"""``aurora status`` shows canary analyses and watches."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from ops.observe.status import Overview, build_status_table, describe_speedup
from schemas.status import ComparedStatus, ComparisonStatus, PromoterStatus


def shown(promoter: PromoterStatus) -> str:
    console = Console(width=300, record=True, file=StringIO())
    console.print(build_status_table(Overview(promoter=promoter)))
    return console.export_text()


def test_a_canary_analysis_shows_requests_interval_and_the_last_rollback() -> None:
    overall = ComparedStatus(
        figure="tokens per second", label=None, new=95, before=100, difference=-0.05, low=-0.09, high=-0.01
    )
    canary = ComparisonStatus(
        kind="canary",
        version="8",
        baseline="7",
        start_time=0,
        end_time=60,
        requests=1234,
        baseline_requests=5678,
        figures=[overall, overall.model_copy(update={"label": "sql", "difference": -0.2})],
    )
    text = shown(
        PromoterStatus(
            champion="7",
            candidate="9",
            previous="6",
            canary="8",
            alias_moves=3,
            verdict=None,
            comparisons=[canary],
            last_rollback="worse on label [red]",
            cooldown_until=90.0,
            error=None,
        )
    )
    assert "canary 8 against 7, 1,234 and 5,678 requests, tokens per second -5.0% (-9.0% .. -1.0%), until" in text
    assert "-20.0%" not in text
    assert "promotes nothing before" in text
    assert "rolled back: worse on label [red]" in text


def test_a_promoter_without_a_comparison_shows_its_versions() -> None:
    promoter = PromoterStatus(
        champion="7",
        candidate=None,
        previous=None,
        canary=None,
        alias_moves=0,
        verdict=None,
        comparisons=[],
        last_rollback=None,
        cooldown_until=None,
        error=None,
    )
    assert "champion 7, candidate none" in shown(promoter)


def test_the_speed_up_is_described_as_time_saved_or_lost() -> None:
    assert describe_speedup(1.424, 3600.4) == "1.42x without drafts, 3,600 s saved"
    assert describe_speedup(0.9, -12.0) == "0.90x without drafts, 12 s lost"
