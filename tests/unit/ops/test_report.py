"""The report: one file that needs nothing else, whose charts say what the record says."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest
from demo_run import EMPTY, RUN, START, request

from ops.demo.record import Run
from ops.report.canvas import PALETTE
from ops.report.charts import (
    accepted_per_step_chart,
    domain_spans,
    loss_chart,
    rates,
    smoothed,
    throughput_chart,
    version_marks,
)
from ops.report.demo_page import page

CHARTS = (accepted_per_step_chart, throughput_chart, loss_chart)


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("run", [RUN, EMPTY])
def test_a_chart_is_well_formed_and_grows_with_the_page(chart: object, run: Run) -> None:
    svg = ET.fromstring(chart(run))  # type: ignore[operator]
    assert svg.tag.endswith("svg")
    assert "viewBox" in svg.attrib
    assert "width" not in svg.attrib


@pytest.mark.parametrize("chart", CHARTS)
def test_every_colour_follows_the_page_from_light_to_dark(chart: object) -> None:
    svg: str = chart(RUN)  # type: ignore[operator]
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg.replace("#000000", ""))
    assert "var(--ink)" in svg or "var(--muted)" in svg


def test_every_colour_variable_of_the_charts_is_defined_for_light_and_for_dark() -> None:
    html = page(RUN)
    for variable in PALETTE.values():
        name = variable.removeprefix("var(").removesuffix(")")
        assert html.count(f"{name}:") == 2


def test_the_page_needs_nothing_else() -> None:
    html = page(RUN)
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", html)
    assert "<script" not in html
    assert "@import" not in html


def test_ids_of_two_charts_do_not_meet() -> None:
    ids = [set(re.findall(r'<clipPath id="([^"]+)"', chart(RUN))) for chart in CHARTS]
    assert not ids[0] & ids[1]
    assert not ids[1] & ids[2]


def test_the_page_tells_domains_versions_and_figures() -> None:
    html = page(RUN)
    for told in ("math prompts", "code prompts", "v1", "v2", "without speculation", "900 = 890 in the table"):
        assert told in html
    assert "It started untrained" in html


def test_a_run_that_went_wrong_says_so() -> None:
    html = page(EMPTY)
    assert "stream died with code 1; read .aurora/logs/stream.log" in html
    assert 'class="fault"' in html
    assert 'class="fault"' not in page(RUN)


def test_text_of_the_run_cannot_break_the_page() -> None:
    assert "<b>x" not in page(Run(START, START, crashed="<b>x & y"))


def test_a_domain_begins_with_its_first_answer() -> None:
    spans = domain_spans([request(0, "math"), request(1, "math"), request(2, "code"), request(3, "math")])
    assert [(span.name, span.start, span.end) for span in spans] == [("math", 0.5, 2.5), ("code", 2.5, 4.5)]


def test_a_version_takes_over_after_the_answers_that_had_ended() -> None:
    marks = version_marks(RUN, RUN.requests)
    assert [(mark.label, mark.at) for mark in marks] == [("v1", 37.5), ("v2", 87.5)]


def test_the_rate_is_that_of_the_counter() -> None:
    found = rates(RUN.samples)
    assert found
    assert all(rate == pytest.approx(30) for _, rate in found)


def test_one_bad_step_does_not_bend_the_loss() -> None:
    assert smoothed([1.0] * 10 + [99.0] + [1.0] * 10) == [1.0] * 21
