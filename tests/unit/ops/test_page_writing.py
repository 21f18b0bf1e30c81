"""A page goes where it was asked for, or the option that asked is named."""

from pathlib import Path

import pytest

from ops.report.writing import write_page
from schemas.errors import UserError


def test_a_page_is_written_into_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    write_page("--html", tmp_path / "new" / "page.html", "<p>")
    assert (tmp_path / "new" / "page.html").read_text() == "<p>"


def test_a_page_that_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--svg .*file/picture\.svg: "):
        write_page("--svg", tmp_path / "file" / "picture.svg", "")
