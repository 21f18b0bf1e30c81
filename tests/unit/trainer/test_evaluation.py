"""Held-out samples are compared by label."""

from __future__ import annotations

from dataclasses import replace

from recorded import conversation, record_of, tables_of

from trainer.data.samples import Sample, read_sample, split_sample
from trainer.release.evaluation import group_by_label


def sample(label: str | None) -> Sample:
    (row,) = tables_of(record_of("r", conversation(range(1, 14), 3), 0))["accepted"].to_pylist()
    return read_sample({**row, "label": label}, [])


def test_a_sample_and_its_parts_keep_their_label() -> None:
    assert sample("sql").label == "sql"
    assert {piece.label for piece in split_sample(sample("sql"), 4, 2)} == {"sql"}


def test_labels_with_too_few_samples_are_taken_together() -> None:
    plain = sample(None)
    samples = [replace(plain, label=label) for label in ("sql", "sql", None, None, None, "chat", "code")]
    found = {label: len(chosen) for label, chosen in group_by_label(samples, 2).items()}
    assert found == {"sql": 2, "": 3, None: 2}


def test_labels_with_enough_samples_leave_no_rest() -> None:
    assert list(group_by_label([sample("sql")] * 3, 3)) == ["sql"]
