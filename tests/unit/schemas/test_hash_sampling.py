"""Sampling by hash: deterministic, uniform, and independent for different purposes."""

from hypothesis import given
from hypothesis import strategies as st

from schemas.hash_sampling import hash_ratio

NAMES = [f"request-{number}" for number in range(4000)]


@given(st.text(), st.text(st.characters(codec="ascii"), max_size=16))
def test_a_name_always_gives_the_same_number_below_one(name: str, purpose: str) -> None:
    assert 0 <= hash_ratio(name, purpose) < 1
    assert hash_ratio(name, purpose) == hash_ratio(name, purpose)


def test_numbers_are_uniform() -> None:
    tenths = [int(10 * hash_ratio(name)) for name in NAMES]
    # Each tenth has a mean of 400 and a standard deviation of 19.
    assert all(300 < tenths.count(tenth) < 500 for tenth in range(10))


def test_purposes_are_independent() -> None:
    low = [name for name in NAMES if hash_ratio(name) < 0.5]
    both = sum(hash_ratio(name, "other") < 0.5 for name in low)
    assert 0.45 < both / len(low) < 0.55
