"""Pruning keeps all that is new, named, served, an anchor or a parent of these, and deletes the rest."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from schemas.speculator.layouts import Verifier
from trainer.release.draft_export import find_ancestors, load_command
from trainer.release.registry import Version
from trainer.release.version_retention import plan_retention

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def version(number: int, parent: str | None = None, **tags: str) -> Version:
    return Version(str(number), NOW, tags | ({"parent": parent} if parent else {}), "", "")


def chain(count: int) -> list[Version]:
    """Versions of which each has the one before as its parent."""
    return [version(1, "day-0-head-0"), *(version(n, str(n - 1)) for n in range(2, count + 1))]


def test_every_kept_version_has_its_reason() -> None:
    plan = plan_retention(chain(12), {"champion": "6"}, 2, served={"4", "day-0-head-0"}, anchors={"2", "99"})
    assert plan.kept == {
        "12": "among the newest",
        "11": "among the newest",
        "10": "parent of 11",
        "6": "is champion",
        "5": "parent of 6",
        "4": "served by a node",
        "3": "parent of 4",
        "2": "an anchor",
        "1": "parent of 2",
    }
    assert plan.deleted == ("7", "8", "9")


@given(
    parents=st.lists(st.integers(0, 20), min_size=1, max_size=20),
    named=st.dictionaries(st.sampled_from(["champion", "candidate", "canary", "previous"]), st.integers(1, 20)),
    keep=st.integers(1, 25),
    served=st.sets(st.integers(0, 21)),
    anchors=st.sets(st.integers(0, 21)),
)
def test_nothing_that_is_needed_is_deleted(
    parents: list[int], named: dict[str, int], keep: int, served: set[int], anchors: set[int]
) -> None:
    versions = [version(n, str(min(parent, n - 1))) for n, parent in enumerate(parents, start=1)]
    aliases = {alias: str(min(number, len(versions))) for alias, number in named.items()}
    plan = plan_retention(versions, aliases, keep, set(map(str, served)), set(map(str, anchors)))
    numbers = {one.number for one in versions}
    needed = {*aliases.values(), *map(str, served), *map(str, anchors), *(v.number for v in versions[-keep:])}
    parents_needed = {one.tags["parent"] for one in versions if one.number in needed}
    assert plan.kept.keys() == (needed | parents_needed) & numbers
    assert set(plan.deleted) == numbers - plan.kept.keys()


def test_ancestors_end_with_what_was_imported() -> None:
    versions = [version(1, imported_from="models:/theirs@best"), version(2, "1"), version(3, "2")]
    assert find_ancestors(versions[2], versions) == ["2", "1", "imported from models:/theirs@best"]
    assert find_ancestors(versions[2], versions[2:]) == ["2"]
    assert find_ancestors(version(4), versions) == []


def test_the_command_of_a_card_names_target_and_draft() -> None:
    verifier = Verifier("org/target", (), 4)
    assert "--speculative-draft-model-path out" in load_command("sglang", "out", verifier)
    assert '"model": "out", "num_speculative_tokens": 4' in load_command("vllm", "out", verifier)
    assert load_command("speculators", "out", verifier) == "vllm serve out"
