"""The alias policy follows current answers, and takes no stale answer for a rollback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.events import AUDITED_TAG, Alias, AuditState
from serving.versions.alias_policy import (
    CANARY,
    CHAMPION,
    MAX_DISAGREEMENTS,
    FollowedAlias,
    FollowedAliases,
    RegistryAnswer,
    apply_answer,
    explain_unfollowed,
    follow_alias,
    is_anchor_slice,
    is_canary_slice,
    parse_answer,
    slice_number,
)


def answer(
    champion: str | None, moves: int = 0, audited: str | None = None, canary: str | None = None
) -> RegistryAnswer:
    """Return an answer with an audit state of the champion; without one if ``moves`` is 0."""
    aliases = {alias: version for alias, version in ((CHAMPION, champion), (CANARY, canary)) if version is not None}
    recorded: dict[Alias, str] = {} if audited is None else {"champion": audited}
    return RegistryAnswer(aliases, AuditState(moves=moves, aliases=recorded) if moves else None)


def after(*answers: RegistryAnswer, alias: str = CHAMPION, canary: bool = True, anchor: bool = True) -> FollowedAliases:
    """Return the state after these answers; stale ones change nothing."""
    followed = FollowedAliases()
    for named in answers:
        followed = apply_answer(followed, named, alias, canary=canary, anchor=anchor) or followed
    return followed


def main_after(*answers: RegistryAnswer) -> str | None:
    return after(*answers).main.version


def test_without_an_audit_state_the_alias_is_followed_everywhere() -> None:
    assert [main_after(*map(answer, versions)) for versions in ("1", "13", "132")] == ["1", "3", "2"]


def test_an_unrecorded_alias_is_followed_everywhere_in_spite_of_an_audit_state() -> None:
    answers = [RegistryAnswer({"mine": version}, AuditState(moves=4, aliases={"champion": "9"})) for version in "132"]
    assert after(*answers, alias="mine").main.version == "2"


def test_a_step_up_is_followed_before_it_is_recorded_and_a_rollback_after() -> None:
    begun = (answer("5", 10, "5"), answer("7", 10, "5"))
    assert main_after(*begun) == "7"
    assert main_after(*begun, answer("7", 11, "7"), answer("5", 11, "7")) == "7"
    assert main_after(*begun, answer("7", 11, "7"), answer("5", 12, "5")) == "5"
    assert main_after(*begun, answer("7", 11, "7"), answer("5", 12, "5"), answer("6", 12, "5")) == "6"


def test_a_stale_answer_is_recognized_by_fewer_or_missing_moves() -> None:
    now = after(answer("7", 11, "7"))
    for old in (answer("9", 10, "9"), answer("5", 10, "5"), answer("9"), RegistryAnswer({})):
        assert apply_answer(now, old, CHAMPION, canary=True, anchor=True) is None


def test_an_answer_from_before_the_record_of_a_step_up_does_not_undo_it() -> None:
    assert main_after(answer("5", 10, "5"), answer("7", 10, "5"), answer("5", 10, "5")) == "7"


def test_a_torn_answer_delays_a_rollback_by_one_answer() -> None:
    torn = answer("7", 12, "5")
    assert main_after(answer("7", 11, "7"), torn) == "7"
    assert main_after(answer("7", 11, "7"), torn, answer("5", 12, "5")) == "5"


def test_a_record_of_another_move_does_not_undo_an_unrecorded_step_up() -> None:
    assert main_after(answer("5", 10, "5"), answer("7", 10, "5"), answer("7", 11, "5"), answer("7", 12, "7")) == "7"


def test_the_first_record_of_a_line_does_not_undo_a_step_up() -> None:
    assert main_after(answer("5"), answer("7"), answer("7", 1, "5")) == "7"
    assert main_after(answer("5"), answer("7"), answer("5", 2, "5")) == "5"


def test_an_unrecorded_step_up_is_eventually_unfollowed_after_its_rollback() -> None:
    begun = [answer("5", 10, "5"), answer("7", 10, "5")]
    back = [answer("5", 10, "5")] * MAX_DISAGREEMENTS
    assert main_after(*begun, *back[1:]) == "7"
    assert main_after(*begun, *back) == "5"
    assert main_after(*begun, *back[1:], answer("7", 10, "5"), *back[1:]) == "7"


def test_a_starting_node_follows_the_recorded_version_first() -> None:
    higher, lower = answer("7", 12, "5"), answer("3", 12, "5")
    assert [main_after(*answers) for answers in ([higher], [higher] * 2, [lower], [lower] * 2)] == ["5", "7", "5", "5"]


def test_a_deleted_canary_returns_only_with_a_record() -> None:
    with_canary = AuditState(moves=10, aliases={"champion": "5", "canary": "7"})
    begun = [
        RegistryAnswer({"champion": "5", "canary": "7"}, with_canary),
        RegistryAnswer({"champion": "5"}, with_canary),
    ]
    assert after(begun[0]).canary.version == "7"
    assert after(*begun).canary.version is None
    assert after(*begun, begun[0]).canary.version is None
    again = AuditState(moves=12, aliases=with_canary.aliases)
    assert after(*begun, RegistryAnswer(begun[0].aliases, again)).canary.version == "7"
    assert after(*begun, RegistryAnswer({"champion": "5", "canary": "8"}, with_canary)).canary.version == "8"


def test_a_node_that_serves_no_canaries_follows_none() -> None:
    assert after(answer("5", canary="7"), canary=False).canary == FollowedAlias()


def test_the_anchor_is_followed_down_only_with_a_record() -> None:
    begun = RegistryAnswer({"champion": "7", "previous": "5"}, AuditState(moves=10, aliases={"previous": "5"}))
    unrecorded = RegistryAnswer({"champion": "7", "previous": "3"}, begun.audit)
    recorded = RegistryAnswer(unrecorded.aliases, AuditState(moves=11, aliases={"previous": "3"}))
    assert [after(begun, later).anchor.version for later in (begun, unrecorded, recorded)] == ["5", "5", "3"]
    assert after(begun, anchor=False).anchor == FollowedAlias()


def test_an_unfollowed_version_is_explained() -> None:
    followed = after(answer("7", 11, "7"), answer("5", 11, "7"))
    assert explain_unfollowed(followed.main, answer("5", 11, "7"), CHAMPION) == (
        "champion names version 5: not newer than 7, and no audit state names it"
    )
    assert explain_unfollowed(followed.main, answer("7", 11, "7"), CHAMPION) is None


def test_an_invalid_tag_is_ignored_and_reported() -> None:
    good = AuditState(moves=3, aliases={"champion": "2"})
    assert parse_answer({"champion": "2"}, good.model_dump_json()) == RegistryAnswer({"champion": "2"}, good)
    assert parse_answer({}, None) == RegistryAnswer({})
    for tag in ("", "{}", "null", '{"moves": 0, "aliases": {}}', '{"moves": 1, "aliases": {"champion": "two"}}'):
        named = parse_answer({"champion": "2"}, tag)
        assert (named.aliases, named.audit) == ({"champion": "2"}, None)
        assert named.unreadable is not None
        assert AUDITED_TAG in named.unreadable


class Moment(NamedTuple):
    """State of the registry between two writes."""

    champion: str
    canary: str | None
    moves: int
    recorded: dict[Alias, str]


@dataclass
class World:
    """A registry with movers and a promoter, and a node that reads it, sometimes stale or torn."""

    rising: bool
    """Every champion is newer than the one before."""
    past: list[Moment] = field(default_factory=lambda: [Moment("1", None, 1, {"champion": "1"})])
    seen_until: int = 0
    followed: FollowedAliases = field(default_factory=FollowedAliases)

    def take(self, kind: str, number: int) -> None:
        now = self.past[-1]
        match kind:
            case "champion":
                version = int(now.champion) + number if self.rising else number
                self.past.append(now._replace(champion=str(version)))
            case "canary":
                self.past.append(now._replace(canary=str(number)))
            case "end canary":
                self.past.append(now._replace(canary=None))
            case "record":
                self.past.append(now._replace(moves=now.moves + 1, recorded=_named(now)))
            case "other row":
                self.past.append(now._replace(moves=now.moves + 1))
            case "current":
                self.apply_answer(len(self.past) - 1, len(self.past) - 1)
            case "torn":
                first = min(self.seen_until + number, len(self.past) - 1)
                self.apply_answer(first, min(first + number, len(self.past) - 1))
            case "stale":
                old = number % len(self.past)
                self.apply_answer(old, old)

    def apply_answer(self, aliases: int, audit: int) -> None:
        """Apply an answer with aliases and audit state of these moments, and check the invariants."""
        moves, recorded = self.past[audit].moves, self.past[audit].recorded
        named = RegistryAnswer({**_named(self.past[aliases])}, AuditState(moves=moves, aliases=recorded))
        before, after_ = self.followed, apply_answer(self.followed, named, CHAMPION, canary=True, anchor=True)
        assert (after_ is None) == (moves < before.moves)
        if after_ is None:
            return
        self.seen_until = max(self.seen_until, aliases)
        self.followed = after_
        if after_.main.version is not None and int(after_.main.version) < before.main.highest:
            assert recorded.get("champion") == after_.main.version
            assert moves > before.main.moves
        if CANARY not in named.aliases:
            assert after_.canary.version is None
        if self.rising:
            assert after_.main.highest >= before.main.highest


def _named(moment: Moment) -> dict[Alias, str]:
    named: dict[Alias, str | None] = {"champion": moment.champion, "canary": moment.canary}
    return {alias: version for alias, version in named.items() if version is not None}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["champion", "canary", "end canary", "record", "other row", "current", "torn", "stale"]),
        st.integers(1, 6),
    ),
    max_size=MAX_DISAGREEMENTS - 1,
)


@settings(deadline=None)
@given(steps=STEPS, rising=st.booleans())
def test_only_a_newer_record_moves_a_node_to_an_older_version(
    steps: Sequence[tuple[str, int]], *, rising: bool
) -> None:
    world = World(rising)
    for kind, number in steps:
        world.take(kind, number)


@settings(deadline=None)
@given(steps=STEPS)
def test_with_current_records_and_answers_a_node_follows_the_aliases(
    steps: Sequence[tuple[str, int]],
) -> None:
    world = World(rising=False)
    for kind, number in [*steps, ("record", 1), *[("current", 1)] * (MAX_DISAGREEMENTS + 1)]:
        world.take(kind, number)
    now = world.past[-1]
    assert (world.followed.main.version, world.followed.canary.version) == (now.champion, now.canary)


@settings(deadline=None)
@given(
    share=st.floats(0, 1),
    more=st.floats(0, 1),
    node=st.text(max_size=20),
    number=st.integers(0, 2**40),
)
def test_a_larger_share_keeps_the_slices_of_a_smaller_one(share: float, more: float, node: str, number: int) -> None:
    small, large = sorted((share, more))
    assert is_canary_slice(node, number, small) <= is_canary_slice(node, number, large)
    assert not is_canary_slice(node, number, 0.0)
    assert is_canary_slice(node, number, 1.0)
    assert is_anchor_slice(node, number, small) <= is_anchor_slice(node, number, large)
    assert not is_anchor_slice(node, number, 0.0)
    assert is_anchor_slice(node, number, 1.0)
    if share + more <= 1:
        assert not (is_canary_slice(node, number, share) and is_anchor_slice(node, number, more))


def test_a_canary_has_its_share_of_the_slices_independently_per_node() -> None:
    drawn = [[is_canary_slice(f"node-{n}", number, 0.2) for number in range(2000)] for n in range(3)]
    assert all(0.17 < sum(slices) / 2000 < 0.23 for slices in drawn)
    both = sum(one and other for one, other in zip(drawn[0], drawn[1], strict=True)) / 2000
    assert 0.02 < both < 0.06


def test_slices_are_counted_from_the_epoch() -> None:
    assert [slice_number(time_s, 30.0) for time_s in (0, 29.9, 30, 1_800_000_000)] == [0, 0, 1, 60_000_000]


def test_a_deleted_alias_keeps_the_highest_version() -> None:
    trail = follow_alias(after(answer("7", 11, "7")).main, answer(None, 11, "7"), CHAMPION)
    assert (trail.version, trail.highest) == (None, 7)
