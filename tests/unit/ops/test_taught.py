"""Whether a version has learned from a request, by the version's tags and the commits of the request's windows."""

from __future__ import annotations

import json

import pytest

from ops.observe.lineage import Taught, taught
from trainer.data.data_loader import is_held_out
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
    ("commits", "answer"),
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
def test_what_lies_before_the_mark_has_taught_it(commits: list[int | None], answer: Taught) -> None:
    assert taught(TAGS, LEARNED, commits) == answer
    assert taught(TAGS, KEPT_BACK, commits) == "held out"


def test_a_version_without_the_mark_is_believed_to_have_read_and_no_more() -> None:
    older = {name: value for name, value in TAGS.items() if name != PASSED_TAG}
    assert taught(older, LEARNED, [3, 10]) == "partly"
    assert taught({}, LEARNED, [3, 10]) == "no"
