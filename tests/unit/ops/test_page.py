"""Pages are rendered with escaped text and written to files."""

from pathlib import Path

import pytest

from ops.report.page import TEMPLATES, render_page, write_page
from schemas.errors import UserError


def test_a_page_is_written_into_a_new_folder(tmp_path: Path) -> None:
    write_page("--html", tmp_path / "new" / "page.html", "<p>")
    assert (tmp_path / "new" / "page.html").read_text() == "<p>"


def test_an_unwritable_page_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--svg .*file/picture\.svg: "):
        write_page("--svg", tmp_path / "file" / "picture.svg", "")


def test_a_template_extends_the_base_and_text_is_escaped(tmp_path: Path) -> None:
    template = tmp_path / "mine.html"
    template.write_text(
        '{% extends "base.html" %}{% from "macros.html" import table %}'
        "{% block body %}<p>{{ text }}</p>{{ chart|safe }}{{ table(['a', 'b'], rows) }}{% endblock %}"
    )
    page = render_page(template, text="<i>", chart="<svg/>", rows=[("<b>", 1)])
    assert "<p>&lt;i&gt;</p><svg/>" in page
    assert "<td>&lt;b&gt;</td>" in page
    assert '<td class="number">1</td>' in page
    assert (TEMPLATES / "style.css").read_text() in page
