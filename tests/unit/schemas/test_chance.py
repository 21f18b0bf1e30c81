"""Chance by name: the same at every asking, spread evenly, and independent from purpose to purpose."""

from hypothesis import given
from hypothesis import strategies as st

from schemas.hash_sampling import fixed_chance

NAMES = [f"request-{number}" for number in range(4000)]


@given(st.text(), st.text(st.characters(codec="ascii"), max_size=16))
def test_a_name_gives_the_same_number_below_one_at_every_asking(name: str, purpose: str) -> None:
    assert 0 <= fixed_chance(name, purpose) < 1
    assert fixed_chance(name, purpose) == fixed_chance(name, purpose)


def test_numbers_are_spread_evenly() -> None:
    tenths = [int(10 * fixed_chance(name)) for name in NAMES]
    # Each tenth is 400 in the mean with a deviation of 19.
    assert all(300 < tenths.count(tenth) < 500 for tenth in range(10))


def test_purposes_draw_independently() -> None:
    low = [name for name in NAMES if fixed_chance(name) < 0.5]
    both = sum(fixed_chance(name, "other") < 0.5 for name in low)
    assert 0.45 < both / len(low) < 0.55
