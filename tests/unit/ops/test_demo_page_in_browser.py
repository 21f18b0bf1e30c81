"""Demo report in a browser: no request, no overflow, no overlapping text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, brightness, browser, measure
from demo_run import EMPTY, RUN

from ops.demo.record import DemoRun
from ops.report.demo_page import render_demo_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


def measure_demo(folder: Path, run: DemoRun, width: int, *arguments: str) -> dict[str, Any]:
    return measure(folder, render_demo_page(run), width, *arguments)


@pytest.mark.parametrize("width", [1200, 700, 500])
def test_the_page_fits_its_window_and_chart_text_is_legible(tmp_path: Path, width: int) -> None:
    measured = measure_demo(tmp_path, RUN, width)
    assert measured["width"] <= measured["window"]
    assert measured["charts"] == 3
    assert measured["on"] == []
    assert measured["outside"] == []
    assert measured["smallest"] >= 9
    assert measured["fetched"] == []
    assert {"math prompts", "code prompts", "v1", "v2"} <= set(measured["texts"])


def test_the_page_of_an_empty_run_is_complete(tmp_path: Path) -> None:
    measured = measure_demo(tmp_path, EMPTY, 900)
    assert measured["width"] <= measured["window"]
    assert "no request succeeded" in measured["texts"]


def test_the_page_follows_the_dark_mode_of_the_browser(tmp_path: Path) -> None:
    light, dark = measure_demo(tmp_path, RUN, 900), measure_demo(tmp_path, RUN, 900, "--force-dark-mode")
    assert (brightness(light["paper"]), brightness(dark["paper"])) == ("light", "dark")
    assert (brightness(light["ink"]), brightness(dark["ink"])) == ("dark", "light")


def test_a_screenshot_has_the_color_of_its_series(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render_demo_page(RUN))
    browser(tmp_path, "--window-size=1200,1900", f"--screenshot={tmp_path / 'report.png'}", file.as_uri())
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    pixels = (imread(tmp_path / "report.png")[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (1900, 1200)
    # Line of the acceptance length: --series of style.css.
    assert (pixels == [0x00, 0x72, 0xB2]).all(axis=-1).sum() > 500
