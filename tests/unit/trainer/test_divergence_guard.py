"""When the divergence guard triggers."""

from __future__ import annotations

import math
import random

import pytest

from trainer.loop.divergence_guard import (
    EARLIER,
    LOSSES_KEPT,
    RECENT,
    HeldOutScore,
    find_divergence,
    is_loss_rising,
    judge_state,
)

CHAMPION = HeldOutScore(loss=2.0, accepted_per_step=1.2)


def noisy(level: float, number: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, 0.2) for _ in range(number)]


@pytest.mark.parametrize(("loss", "accepted_per_step"), [(2.0, 1.2), (3.9, 1.2), (2.0, 0.61), (2.9, 0.8), (0.1, 2.0)])
def test_a_score_near_the_champion_passes(loss: float, accepted_per_step: float) -> None:
    assert find_divergence(HeldOutScore(loss=loss, accepted_per_step=accepted_per_step), CHAMPION, "it", 0.5) is None


@pytest.mark.parametrize(
    ("loss", "accepted_per_step", "word"),
    [(2.0, 0.59, "accepted tokens per step"), (4.1, 1.2, "loss"), (None, 1.2, "finite"), (math.nan, 1.2, "finite")],
)
def test_half_the_accepted_tokens_per_step_or_twice_the_loss_is_a_divergence(
    loss: float | None, accepted_per_step: float, word: str
) -> None:
    assert word in (
        find_divergence(HeldOutScore(loss=loss, accepted_per_step=accepted_per_step), CHAMPION, "it", 0.5) or ""
    )


def test_small_scores_may_fall_to_zero() -> None:
    beginning = HeldOutScore(loss=0.02, accepted_per_step=0.04)
    assert find_divergence(HeldOutScore(loss=0.9, accepted_per_step=0.0), beginning, "day 0", 0.5) is None


def test_a_draft_without_acceptance_can_still_diverge() -> None:
    assert find_divergence(
        HeldOutScore(loss=60.0, accepted_per_step=0.0), HeldOutScore(loss=9.0, accepted_per_step=0.0), "day 0", 0.5
    )


def test_a_lower_threshold_needs_a_deeper_fall() -> None:
    now = HeldOutScore(loss=5.0, accepted_per_step=0.5)
    assert find_divergence(now, CHAMPION, "it", 0.5)
    assert find_divergence(now, CHAMPION, "it", 0.3) is None


SLIDE = [1.2, 0.66, 0.36, 0.2, 0.11, 0.06, 0.03]


def train(scores: list[float], champion: float | None, began: float) -> tuple[list[str | None], float]:
    """Judge the states of a training one after the other; return reasons, and the score of the last good state."""
    reasons, good = [], began
    for accepted in scores:
        judged = judge_state(
            scored(accepted), None if champion is None else scored(champion), lambda good=good: scored(good), 0.5
        )
        reasons.append(judged.divergence)
        good = accepted if judged.good else good
    return reasons, good


def scored(accepted_per_step: float) -> HeldOutScore:
    return HeldOutScore(loss=2.0, accepted_per_step=accepted_per_step)


def test_a_slow_slide_is_a_divergence_from_the_champion() -> None:
    reasons, good = train(SLIDE, champion=1.2, began=1.2)
    assert [reason is None for reason in reasons] == [True, True, *[False] * 5]
    assert reasons[2] == "0.360 accepted tokens per step on the held-out set, 1.200 of the champion"
    assert good == 0.66


def test_without_an_answer_of_the_registry_no_state_replaces_the_last_good_one() -> None:
    reasons, good = train(SLIDE, champion=None, began=1.2)
    assert [reason is None for reason in reasons] == [True, True, *[False] * 5]
    assert "the last good checkpoint" in (reasons[2] or "")
    assert good == 1.2


def test_training_that_begins_far_below_the_champion_is_compared_with_its_beginning() -> None:
    reasons, good = train([0.2, 0.4, 0.55, 0.65, 0.5], champion=1.2, began=0.3)
    assert [reason is None for reason in reasons] == [True, True, True, True, False]
    assert good == 0.65
    reasons, good = train([0.2, 0.14], champion=1.2, began=0.3)
    assert [reason is None for reason in reasons] == [True, False]
    assert good == 0.3


def test_without_a_good_checkpoint_the_champion_alone_judges() -> None:
    assert judge_state(scored(0.3), scored(1.2), lambda: None, 0.5).divergence
    judged = judge_state(scored(0.3), None, lambda: None, 0.5)
    assert (judged.divergence, judged.good) == (None, False)


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_single_bad_batches_are_no_rise(seed: int) -> None:
    losses = noisy(2.0, LOSSES_KEPT, seed)
    losses[-3] = 50.0
    assert not is_loss_rising(losses)


def test_a_new_level_is_a_rise() -> None:
    assert is_loss_rising([*noisy(2.0, 40), *noisy(6.0, RECENT)])


def test_a_falling_loss_is_no_rise() -> None:
    assert not is_loss_rising([9.0 - 0.1 * step for step in range(LOSSES_KEPT)])


def test_few_losses_are_no_rise() -> None:
    assert not is_loss_rising([*noisy(2.0, EARLIER - 1), *noisy(60.0, RECENT)])
    assert not is_loss_rising([])


def test_losses_over_different_draft_vocabularies_are_not_compared() -> None:
    now = HeldOutScore(loss=11.0, accepted_per_step=1.2, draft_vocab="counted")
    assert find_divergence(now, HeldOutScore(loss=0.1, accepted_per_step=1.2, draft_vocab="lowest"), "it", 0.5) is None
    assert find_divergence(now, HeldOutScore(loss=0.1, accepted_per_step=1.2, draft_vocab="counted"), "it", 0.5)
    worse = now.model_copy(update={"accepted_per_step": 0.5})
    assert find_divergence(worse, HeldOutScore(loss=0.1, accepted_per_step=1.2, draft_vocab="lowest"), "it", 0.5)
