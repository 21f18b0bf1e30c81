"""Report of a demo run: a self-contained page whose charts show the record."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest
from demo_run import EMPTY, RUN, START, request

from ops.demo.record import DemoRun
from ops.report.charts import (
    acceptance_chart,
    domain_spans,
    loss_chart,
    sample_rates,
    smooth,
    throughput_chart,
    version_marks,
)
from ops.report.demo_page import render_demo_page
from ops.report.theme import PALETTE

CHARTS = (acceptance_chart, throughput_chart, loss_chart)


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("run", [RUN, EMPTY])
def test_a_chart_is_well_formed_and_scales_with_the_page(chart: object, run: DemoRun) -> None:
    svg = ET.fromstring(chart(run))  # type: ignore[operator]
    assert svg.tag.endswith("svg")
    assert "viewBox" in svg.attrib
    assert "width" not in svg.attrib


@pytest.mark.parametrize("chart", CHARTS)
def test_every_color_is_a_variable_of_the_page(chart: object) -> None:
    svg: str = chart(RUN)  # type: ignore[operator]
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg.replace("#000000", ""))
    assert "var(--ink)" in svg or "var(--muted)" in svg


def test_every_color_variable_is_defined_for_light_and_dark() -> None:
    html = render_demo_page(RUN)
    for variable in PALETTE.values():
        name = variable.removeprefix("var(").removesuffix(")")
        assert html.count(f"{name}:") == 2


def test_the_page_is_self_contained() -> None:
    html = render_demo_page(RUN)
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", html)
    assert "<script" not in html
    assert "@import" not in html


def test_charts_have_distinct_element_ids() -> None:
    ids = [set(re.findall(r'<clipPath id="([^"]+)"', chart(RUN))) for chart in CHARTS]
    assert not ids[0] & ids[1]
    assert not ids[1] & ids[2]


def test_the_page_shows_domains_versions_and_figures() -> None:
    html = render_demo_page(RUN)
    for text in ("math prompts", "code prompts", "v1", "v2", "without speculation", "900 = 890 in the table"):
        assert text in html
    assert "It started untrained" in html


def test_the_page_shows_faults() -> None:
    html = render_demo_page(EMPTY)
    assert "stream died with code 1; read .aurora/logs/stream.log" in html
    assert 'class="fault"' in html
    assert 'class="fault"' not in render_demo_page(RUN)


def test_text_of_the_run_is_escaped() -> None:
    assert "<b>x" not in render_demo_page(DemoRun(START, START, crashed="<b>x & y"))


def test_a_domain_starts_with_its_first_response() -> None:
    spans = domain_spans([request(0, "math"), request(1, "math"), request(2, "code"), request(3, "math")])
    assert [(span.name, span.start, span.end) for span in spans] == [("math", 0.5, 2.5), ("code", 2.5, 4.5)]


def test_a_version_mark_follows_the_responses_that_ended_before_the_swap() -> None:
    marks = version_marks(RUN, RUN.requests)
    assert [(mark.label, mark.at) for mark in marks] == [("v1", 37.5), ("v2", 87.5)]


def test_the_rate_is_the_slope_of_the_counter() -> None:
    found = sample_rates(RUN.samples)
    assert found
    assert all(rate == pytest.approx(30) for _, rate in found)


def test_one_outlier_does_not_change_the_smoothed_loss() -> None:
    assert smooth([1.0] * 10 + [99.0] + [1.0] * 10) == [1.0] * 21
