"""Which windows of the held-out set a version is compared on, label by label."""

from __future__ import annotations

from dataclasses import replace

from recorded import conversation, record_of, tables_of

from trainer.data.rows import window_of
from trainer.data.samples import Window, cut
from trainer.release.registration import by_label


def window(label: str | None) -> Window:
    (row,) = tables_of(record_of("r", conversation(range(1, 14), 3), 0))["accepted"].to_pylist()
    return window_of({**row, "label": label}, [])


def test_a_window_and_its_pieces_know_their_label() -> None:
    assert window("sql").label == "sql"
    assert {piece.label for piece in cut(window("sql"), 4)} == {"sql"}


def test_labels_with_too_few_windows_are_taken_together() -> None:
    plain = window(None)
    windows = [replace(plain, label=label) for label in ("sql", "sql", None, None, None, "chat", "code")]
    found = {label: len(chosen) for label, chosen in by_label(windows, 2).items()}
    assert found == {"sql": 2, "": 3, None: 2}


def test_there_is_no_rest_where_every_label_has_enough() -> None:
    assert list(by_label([window("sql")] * 3, 3)) == ["sql"]
