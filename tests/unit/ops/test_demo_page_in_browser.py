"""Demo report in a browser: no request, no overflow, no overlapping text."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from demo_run import EMPTY, RUN

from ops.demo.record import DemoRun
from ops.report.demo_page import render_demo_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>
addEventListener("load", () => {
  const texts = [...document.querySelectorAll("svg text")].map(t => ({svg: t.closest("svg"), said: t.textContent.trim(),
    box: t.getBoundingClientRect()})).filter(t => t.said);
  const beside = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1;
  const apart = (a, b) => beside(a, b) || a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
  const on = [];
  texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
    if (a.svg === b.svg && !apart(a.box, b.box)) on.push([a.said, b.said]);
  }));
  const outside = texts.filter(t => { const s = t.svg.getBoundingClientRect();
    return t.box.left < s.left - 2 || t.box.right > s.right + 2 || t.box.top < s.top - 2 || t.box.bottom > s.bottom + 2;
  }).map(t => t.said);
  const seen = {
    width: document.documentElement.scrollWidth, window: innerWidth, charts: document.querySelectorAll("svg").length,
    smallest: Math.min(...texts.map(t => t.box.height)), texts: texts.map(t => t.said), on, outside,
    fetched: performance.getEntriesByType("resource").map(r => r.name).filter(name => !name.startsWith("data:")),
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  };
  const measured = document.createElement("pre");
  measured.id = "seen"; measured.textContent = JSON.stringify(seen); document.body.append(measured);
});
</script>"""
"""Script that measures the page and writes the measurements into it."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


def browser(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    # Root in a container cannot use the sandbox, and the page is trusted.
    own = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [CHROMIUM, *own, "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measure(folder: Path, run: DemoRun, width: int, *arguments: str) -> dict[str, Any]:
    file = folder / "report.html"
    file.write_text(render_demo_page(run).replace("</head>", PROBE + "</head>"))
    shown = browser(folder, f"--window-size={width},2000", "--dump-dom", *arguments, file.as_uri())
    assert "CONSOLE" not in shown.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found is not None, shown.stdout[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


@pytest.mark.parametrize("width", [1200, 700, 500])
def test_the_page_fits_its_window_and_chart_text_is_legible(tmp_path: Path, width: int) -> None:
    measured = measure(tmp_path, RUN, width)
    assert measured["width"] <= measured["window"]
    assert measured["charts"] == 3
    assert measured["on"] == []
    assert measured["outside"] == []
    assert measured["smallest"] >= 9
    assert measured["fetched"] == []
    assert {"math prompts", "code prompts", "v1", "v2"} <= set(measured["texts"])


def test_the_page_of_an_empty_run_is_complete(tmp_path: Path) -> None:
    measured = measure(tmp_path, EMPTY, 900)
    assert measured["width"] <= measured["window"]
    assert "no request succeeded" in measured["texts"]


def test_the_page_follows_the_dark_mode_of_the_browser(tmp_path: Path) -> None:
    light, dark = measure(tmp_path, RUN, 900), measure(tmp_path, RUN, 900, "--force-dark-mode")
    assert (brightness(light["paper"]), brightness(dark["paper"])) == ("light", "dark")
    assert (brightness(light["ink"]), brightness(dark["ink"])) == ("dark", "light")


def brightness(color: str) -> str:
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return "light" if red + green + blue > 3 * 128 else "dark"


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
