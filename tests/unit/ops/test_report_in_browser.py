"""The demo's report as a browser draws it: nothing is fetched, nothing runs over the edge, no text lies on another."""

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

from ops.demo.record import Run
from ops.report.demo_page import page

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
  const told = document.createElement("pre");
  told.id = "seen"; told.textContent = JSON.stringify(seen); document.body.append(told);
});
</script>"""
"""Looks at the page from within and writes down what it saw."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


def browser(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    # The sandbox cannot be had by root in a container, and the page is ours.
    own = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [CHROMIUM, *own, "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def seen(folder: Path, run: Run, width: int, *arguments: str) -> dict[str, Any]:
    file = folder / "report.html"
    file.write_text(page(run).replace("</head>", PROBE + "</head>"))
    shown = browser(folder, f"--window-size={width},2000", "--dump-dom", *arguments, file.as_uri())
    assert "CONSOLE" not in shown.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found is not None, shown.stdout[-2000:]
    told: dict[str, Any] = json.loads(html.unescape(found[1]))
    return told


@pytest.mark.parametrize("width", [1200, 700, 500])
def test_a_page_fits_its_window_and_every_text_of_a_chart_can_be_read(tmp_path: Path, width: int) -> None:
    told = seen(tmp_path, RUN, width)
    assert told["width"] <= told["window"]
    assert told["charts"] == 3
    assert told["on"] == []
    assert told["outside"] == []
    assert told["smallest"] >= 9
    assert told["fetched"] == []
    assert {"math prompts", "code prompts", "v1", "v2"} <= set(told["texts"])


def test_a_page_about_nothing_is_a_page(tmp_path: Path) -> None:
    told = seen(tmp_path, EMPTY, 900)
    assert told["width"] <= told["window"]
    assert "no request was answered" in told["texts"]


def test_it_is_dark_where_the_reader_has_it_dark(tmp_path: Path) -> None:
    light, dark = seen(tmp_path, RUN, 900), seen(tmp_path, RUN, 900, "--force-dark-mode")
    assert (brightness(light["paper"]), brightness(dark["paper"])) == ("light", "dark")
    assert (brightness(light["ink"]), brightness(dark["ink"])) == ("dark", "light")


def brightness(colour: str) -> str:
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return "light" if red + green + blue > 3 * 128 else "dark"


def test_a_screenshot_has_the_colours_of_its_series(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(RUN))
    browser(tmp_path, "--window-size=1200,1900", f"--screenshot={tmp_path / 'report.png'}", file.as_uri())
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    pixels = (imread(tmp_path / "report.png")[..., :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (1900, 1200)
    # The line of the accepted tokens per step, --series of page.css.
    assert (pixels == [0x00, 0x72, 0xB2]).all(axis=-1).sum() > 500
