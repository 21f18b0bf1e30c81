"""Whether a version is trained on a request, by its tags and the commits of the samples."""

from __future__ import annotations

import json

import pytest

from ops.observe.lineage import TrainedOn, is_trained_on
from trainer.data.held_out import is_held_out
from trainer.release.registration import PASSED_TAG, SETTINGS_TAG

SHARE = 0.5
TAGS = {
    "tables": json.dumps({"accepted": 20, "rejected": 30}),
    PASSED_TAG: "10",
    SETTINGS_TAG: json.dumps({"train": {"held_out_ratio": SHARE}}),
}
NAMES = [f"request-{number}" for number in range(50)]
LEARNED = next(name for name in NAMES if not is_held_out(name, SHARE))
KEPT_BACK = next(name for name in NAMES if is_held_out(name, SHARE))


@pytest.mark.parametrize(
    ("commits", "expected"),
    [
        ([3, 10], "yes"),
        ([10, 11], "partly"),
        ([20, 21], "partly"),
        ([21, 21], "no"),
        ([3, None], "partly"),
        ([None, None], "no"),
        ([], "no"),
    ],
)
def test_a_version_is_trained_on_commits_up_to_its_mark(commits: list[int | None], expected: TrainedOn) -> None:
    assert is_trained_on(TAGS, LEARNED, commits) == expected
    assert is_trained_on(TAGS, KEPT_BACK, commits) == "held out"


def test_a_version_without_a_mark_is_at_most_partly_trained() -> None:
    older = {name: value for name, value in TAGS.items() if name != PASSED_TAG}
    assert is_trained_on(older, LEARNED, [3, 10]) == "partly"
    assert is_trained_on({}, LEARNED, [3, 10]) == "no"
