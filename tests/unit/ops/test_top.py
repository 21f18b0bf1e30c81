"""Screen of ``aurora top``."""

from __future__ import annotations

from io import StringIO
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from ops.observe.status import Overview
from ops.observe.top import History, compute_rates, render_screen
from schemas.status import PromoterStatus, RejectedVersionStatus, ServeStatus, SwapStatus


def empty(status: type[BaseModel], **known: Any) -> Any:
    """Return a status with zeros for all other fields."""
    zeros: dict[Any, Any] = {int: 0, float: 0.0, bool: True, str: "-"}
    blank = {
        name: zeros.get(field.annotation, [] if "list" in str(field.annotation) else None)
        for name, field in status.model_fields.items()
    }
    return status.model_validate(blank | known)


def node(**known: Any) -> ServeStatus:
    status: ServeStatus = empty(ServeStatus, **known)
    return status


def shown(history: History) -> str:
    console = Console(width=120, record=True, file=StringIO())
    console.print(render_screen(history, 2.0))
    return console.export_text()


def test_rates_are_those_between_two_polls() -> None:
    counted = {"verify_steps": 100, "accepted_tokens": 50, "suffix_accepted_tokens": 40}
    before = node(**counted, output_tokens=200, requests_finished=3)
    counted = {"verify_steps": 140, "accepted_tokens": 110, "suffix_accepted_tokens": 70}
    now = node(**counted, output_tokens=300, requests_finished=5)
    found = compute_rates(before, now, 4.0)
    assert found is not None
    assert (found.tokens_per_s, found.acceptance_length, found.requests_per_s) == (25.0, 2.5, 0.5)
    assert found.suffix_accepted_per_step == 0.75


def test_without_verify_steps_there_is_no_acceptance_length() -> None:
    found = compute_rates(node(verify_steps=5, accepted_tokens=5), node(verify_steps=5, accepted_tokens=5), 1.0)
    assert found is not None
    assert found.acceptance_length is None


def test_a_restarted_node_has_no_rates_until_the_next_poll() -> None:
    assert (
        compute_rates(node(verify_steps=100, requests_finished=9), node(verify_steps=2, requests_finished=0), 1.0)
        is None
    )


def test_the_screen_shows_rates_versions_and_events() -> None:
    promoter: PromoterStatus = empty(PromoterStatus, champion="7", verdict="version 7 is champion", error=None)
    swap = SwapStatus(version="7", time=1_700_000_000, in_flight=3, pause_ms=12.4)
    refused = RejectedVersionStatus(version="8", time=1_700_000_010, why="tensor fc.weight is missing [x]")
    history = History()
    history.add(Overview(serve=node(), promoter=promoter), 10.0)
    now = node(
        verify_steps=40,
        accepted_tokens=60,
        output_tokens=100,
        speedup=1.42,
        saved_s=1234.0,
        speculator="7",
        swaps=[swap],
        versions_rejected=[refused],
    )
    history.add(Overview(serve=now, promoter=promoter, silent={"train": "no status [Errno 111]"}), 14.0)
    screen = shown(history)
    assert "25.0" in screen
    assert "2.50" in screen
    assert "1.42x, +1,234 s saved" in screen
    assert "version 7 is champion" in screen
    assert "version 7 swapped in, 12 ms, 3 requests in flight" in screen
    assert "version 8 rejected: tensor fc.weight is missing [x]" in screen
    assert "no status [Errno 111]" in screen


def test_the_history_holds_acceptance_lengths_of_polls_with_verify_steps() -> None:
    history = History()
    for at, verify_steps in enumerate([0, 10, 10, 20]):
        history.add(Overview(serve=node(verify_steps=verify_steps, accepted_tokens=2 * verify_steps)), float(at))
    assert list(history.acceptance_lengths) == [3.0, 3.0]
    assert len(history.token_rates) == 3
