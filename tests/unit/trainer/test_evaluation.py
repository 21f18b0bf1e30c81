"""Held-out samples are compared by request and by label."""

from __future__ import annotations

from dataclasses import replace

from recorded import conversation, record_of, tables_of

from trainer.data.samples import Sample, read_sample, split_sample
from trainer.objective.simulated_acceptance import SimulatedAcceptance
from trainer.release.evaluation import compare_requests, group_by_label


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


def test_all_samples_of_a_request_count_as_one() -> None:
    plain = sample(None)
    of_one = [replace(plain, request="r") for _ in range(16)]
    of_many = [replace(plain, request=f"r{number}") for number in range(16)]
    for samples, requests in ((of_one, None), (of_many, 16)):
        own = {one: SimulatedAcceptance(8 + number % 3, 10) for number, one in enumerate(samples)}
        interval = compare_requests(own, dict.fromkeys(samples, SimulatedAcceptance(2, 10)), error=0.05)
        assert (interval and interval.requests) == requests


def test_a_request_without_positions_does_not_count() -> None:
    samples = [replace(sample(None), request=f"r{number}") for number in range(16)]
    own = {one: SimulatedAcceptance(number % 3, 10 * (number > 0)) for number, one in enumerate(samples)}
    interval = compare_requests(own, {one: SimulatedAcceptance(0, own[one].positions) for one in samples}, error=0.05)
    assert interval is not None
    assert interval.requests == 15
