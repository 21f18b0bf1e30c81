"""The gate passes only candidates that beat the champion."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from promoter_world import figures

from schemas.settings import Promoter as PromoterSettings
from trainer.release.gate import HELD_OUT_TAG, HeldOutComparison, LabelComparison, is_worth_registering, judge_candidate


@pytest.mark.parametrize(
    ("champion", "tags", "promote", "says"),
    [
        (None, figures(0.5, "day-0-head-0", 0.1), True, "better by more than"),
        ("3", figures(0.5, "3", 0.4), True, "better by more than"),
        ("3", figures(0.5, "3", 0.5), False, "not better"),
        ("3", figures(0.45, "3", 0.41), False, "promoter.gate_margin 0.05"),
        ("3", figures(0.9, "2", 0.1), False, "champion is 3, waiting for the next candidate"),
        ("3", figures(0.9, "day-0-head-0", 0.1), False, "waiting for the next candidate"),
        (None, figures(0.9, "3", 0.1), False, "champion is day-0, waiting"),
        ("3", figures(0.9, "3", 0.1, samples=7), False, "promoter.gate_min_samples requires 8"),
        ("4", figures(0.9, "3", 0.1), False, "version 4 is champion"),
        ("3", {}, False, "tag held_out"),
        ("3", {"held_out": '{"accepted_per_step": 1}'}, False, "tag held_out"),
    ],
)
def test_the_gate_promotes_only_what_beat_the_present_champion(
    champion: str | None, tags: Mapping[str, str], promote: bool, says: str
) -> None:
    verdict = judge_candidate("4", champion, tags, PromoterSettings(gate_margin=0.05, gate_min_samples=8))
    assert verdict.promote is promote
    assert says in verdict.why


def test_without_a_candidate_nothing_is_promoted() -> None:
    assert judge_candidate(None, "1", {}, PromoterSettings()).promote is False


@pytest.mark.parametrize(
    ("labels", "lost"),
    [
        ([("sql", 0.46, 4), ("chat", 0.9, 20)], None),
        ([("sql", 0.44, 4), ("chat", 0.9, 20)], "label sql 1.440 against 1.500 on 4 samples"),
        ([("sql", 0.1, 3), ("chat", 0.9, 20)], None),
        ([("sql", 0.3, 4), ("", 0.2, 4)], "label none 1.200"),
        ([(None, 0.2, 4)], "the other labels 1.200"),
    ],
)
def test_a_candidate_that_is_better_over_all_must_not_lose_on_a_label(
    labels: list[tuple[str | None, float, int]], lost: str | None
) -> None:
    on = [
        LabelComparison(label=label, accepted_per_step=length, champion_accepted_per_step=0.5, samples=samples)
        for label, length, samples in labels
    ]
    held_out = HeldOutComparison(
        accepted_per_step=0.8, champion="3", champion_accepted_per_step=0.5, samples=24, labels=tuple(on)
    )
    tags = {HELD_OUT_TAG: held_out.model_dump_json()}
    verdict = judge_candidate("4", "3", tags, PromoterSettings(gate_label_margin=0.05, gate_label_min_samples=4))
    assert verdict.promote is (lost is None)
    assert (lost or "better by more than") in verdict.why


def test_figures_of_labels_are_among_those_that_are_written_down() -> None:
    on = LabelComparison(label="sql", accepted_per_step=0.4, champion_accepted_per_step=0.3, samples=4)
    held_out = HeldOutComparison(
        accepted_per_step=0.8, champion="3", champion_accepted_per_step=0.5, samples=24, labels=(on,)
    )
    assert held_out.figures["accepted_per_step/sql"] == 0.4
    assert HeldOutComparison.from_tags({HELD_OUT_TAG: held_out.model_dump_json()}) == held_out


def test_a_version_is_registered_only_if_it_beats_the_one_before() -> None:
    assert is_worth_registering(0.3, champion=0.1, last=None)
    assert not is_worth_registering(0.1, champion=0.1, last=None)
    assert is_worth_registering(0.3, champion=0.1, last=0.2)
    assert not is_worth_registering(0.2, champion=0.1, last=0.2)
