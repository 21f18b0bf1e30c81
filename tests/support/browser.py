"""A browser without a screen, and measurements of a page that it shows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

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


def browser(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    # Root in a container cannot use the sandbox, and the page is trusted.
    own = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command = [CHROMIUM, *own, "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measure(folder: Path, page: str, width: int, *arguments: str) -> dict[str, Any]:
    """Return the measurements of a page in a window of this width."""
    file = folder / "page.html"
    file.write_text(page.replace("</head>", PROBE + "</head>"))
    shown = browser(folder, f"--window-size={width},2000", "--dump-dom", *arguments, file.as_uri())
    assert "CONSOLE" not in shown.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found is not None, shown.stdout[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


def brightness(color: str) -> str:
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return "light" if red + green + blue > 3 * 128 else "dark"
