"""Held-out samples are compared by prompt and by label."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from recorded import conversation, record_of, tables_of

from trainer.data.samples import Sample, read_sample, split_sample
from trainer.objective.simulated_acceptance import SimulatedAcceptance
from trainer.release.evaluation import compare_labels, compare_prompts, group_by_label


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


def test_all_samples_of_a_prompt_count_as_one() -> None:
    plain = sample(None)
    choices = [replace(plain, request=f"r{number}") for number in range(16)]
    prompts = [replace(one, prompt_key=f"p{number}") for number, one in enumerate(choices)]
    for samples, count in ((choices, None), (prompts, 16)):
        own = {one: SimulatedAcceptance(8 + number % 3, 10) for number, one in enumerate(samples)}
        interval = compare_prompts(own, dict.fromkeys(samples, SimulatedAcceptance(2, 10)), error=0.05)
        assert (interval and interval.prompts) == count


def test_the_interval_of_a_label_is_that_of_its_prompts_alone() -> None:
    plain = sample(None)
    samples = [replace(plain, prompt_key=f"p{n}", label=("sql", "chat")[n % 2]) for n in range(32)]
    own = {one: SimulatedAcceptance(8 + number % 5, 10) for number, one in enumerate(samples)}
    other = dict.fromkeys(samples, SimulatedAcceptance(9, 10))
    for compared in compare_labels(own, other, 4, 0.05):
        interval = compare_prompts({one: own[one] for one in samples if one.label == compared.label}, other, 0.05)
        assert interval is not None
        assert (compared.gain_low, compared.gain_high) == (interval.low, interval.high)


def test_rows_without_a_prompt_key_count_by_request() -> None:
    (row,) = tables_of(record_of("r", conversation(range(1, 14), 3), 0))["accepted"].to_pylist()
    rows = [{**row, "request": f"r{number // 2}", "prompt_key": None} for number in range(16)]
    own = {read_sample(row, []): SimulatedAcceptance(8 + number % 3, 10) for number, row in enumerate(rows)}
    interval = compare_prompts(own, dict.fromkeys(own, SimulatedAcceptance(2, 10)), error=0.05)
    assert interval is not None
    assert interval.prompts == 8


def test_a_prompt_without_verify_steps_does_not_count() -> None:
    samples = [replace(sample(None), prompt_key=f"p{number}") for number in range(16)]
    own = {one: SimulatedAcceptance(number % 3, 10 * (number > 0)) for number, one in enumerate(samples)}
    interval = compare_prompts(own, {one: SimulatedAcceptance(0, own[one].verify_steps) for one in samples}, error=0.05)
    assert interval is not None
    assert interval.prompts == 15


def test_a_draft_without_a_gain_passes_at_most_at_the_nominal_rate_where_prompts_have_several_choices() -> None:
    error, trials, prompts, choices = 0.05, 400, 10, 6
    plain = sample(None)
    samples = [replace(plain, request=f"r{n}", prompt_key=f"p{n // choices}") for n in range(prompts * choices)]
    passed = {"prompts": 0, "requests": 0}
    for trial in range(trials):
        random = np.random.default_rng(trial)
        luck_P = random.normal(0, 0.15, prompts).repeat(choices)
        own = random.binomial(120, np.clip(0.4 + luck_P, 0, 1))
        accepted = {one: SimulatedAcceptance(int(tokens), 40) for one, tokens in zip(samples, own, strict=True)}
        other = dict.fromkeys(samples, SimulatedAcceptance(48, 40))
        apart = {one: replace(one, prompt_key=one.request) for one in samples}
        for by, of in ("prompts", {one: one for one in samples}), ("requests", apart):
            own_of = {of[one]: accepted[one] for one in samples}
            interval = compare_prompts(own_of, {of[one]: other[one] for one in samples}, error)
            passed[by] += interval is not None and interval.low > 0
    assert passed["prompts"] / trials <= error + 3 * math.sqrt(error * (1 - error) / trials)
    assert passed["requests"] / trials > 3 * error, "choices of a prompt agree by chance"
