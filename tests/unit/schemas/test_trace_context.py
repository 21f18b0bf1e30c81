"""Trace contexts in headers, request ids and versions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.telemetry.trace_context import TraceContext, parse_traceparent, request_context, version_context

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
contexts = st.builds(
    lambda trace, span, sampled: TraceContext(f"{trace:032x}", f"{span:016x}", sampled),
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.booleans(),
)


@given(contexts)
def test_a_header_is_parsed_as_it_was_written(context: TraceContext) -> None:
    header = context.to_traceparent()
    assert parse_traceparent(header) == parse_traceparent(header.encode()) == context


@given(contexts, st.sampled_from(["chatcmpl", "cmpl"]), st.none() | st.integers(0, 99))
def test_a_request_id_carries_its_span_also_for_one_of_several_choices(
    context: TraceContext, prefix: str, choice: int | None
) -> None:
    found = request_context(context.to_request_id(prefix) + ("" if choice is None else f"-{choice}"))
    assert (found.trace_id, found.span_id) == (context.trace_id, context.span_id)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        TRACEPARENT.upper(),
        TRACEPARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        TRACEPARENT.replace("00f067aa0ba902b7", "0" * 16),
        TRACEPARENT.replace("00-", "ff-", 1),
        TRACEPARENT + "-more",
        TRACEPARENT.replace("00-", "01-", 1) + "more",
    ],
)
def test_a_malformed_header_is_ignored(header: str | None) -> None:
    assert parse_traceparent(header) is None


def test_a_header_of_a_later_version_is_parsed_up_to_its_unknown_fields() -> None:
    assert parse_traceparent(TRACEPARENT.replace("00-", "01-", 1) + "-more") == parse_traceparent(TRACEPARENT)


def test_ids_of_other_servers_and_versions_map_to_stable_traces_of_their_own() -> None:
    named = [request_context("rid-7"), request_context("rid-8"), version_context("a", "7")]
    assert len({context.trace_id for context in named}) == 3
    assert named == [request_context("rid-7"), request_context("rid-8"), version_context("a", "7")]
    assert all(parse_traceparent(context.to_traceparent()) == context for context in named)
