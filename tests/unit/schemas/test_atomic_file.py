"""Atomic writes: readers see the old or the new content, and no temporary file remains."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from schemas.atomic_file import atomic_write


def test_a_file_is_created_with_its_folder_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file.json"
    atomic_write(file, "old")
    atomic_write(file, b"new")
    assert file.read_bytes() == b"new"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    file = tmp_path / "file.json"
    atomic_write(file, "old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="no space left"):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_permissions_can_be_restricted(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    atomic_write(file, "secret", mode=0o600)
    assert file.stat().st_mode & 0o777 == 0o600
