"""Render pages from Jinja2 templates and write them to files.

Every page is one HTML file without external resources. Its template extends ``base.html`` (head, style sheet) and may
import ``macros.html`` (headline figures, tables). Text is escaped; SVG charts pass through the ``safe`` filter.
Templates outside of this package, such as those of the benchmarks, extend the same base:

    render_page(Path(__file__).with_name("sync.html"), subtitle=..., figures=[("3.1 ms", "swap pause")])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from schemas.errors import UserError

TEMPLATES = Path(__file__).with_name("templates")
STYLE = (TEMPLATES / "style.css").read_text()
"""Style sheet of every page; defines the color variables that the charts use."""


def render_page(template: Path, **values: Any) -> str:
    """Return the page of a template; an undefined variable is an error."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = format_number
    return environment.get_template(template.name).render(values)


def format_number(value: float | None, digits: int = 2) -> str:
    """Return a number with fixed digits, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def write_page(option: str, file: Path, text: str) -> None:
    """Write a page or a chart and create its folder.

    Args:
        option: Command-line option that named the file, for the error message.
        file: Destination.
        text: Content.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise UserError(f"{option} {file}: {error.strerror}") from error
