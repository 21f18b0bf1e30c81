"""The planner's budget follows measured latency, measured acceptance, and the sequences that may draft."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.planner import (
    AcceptanceModel,
    DraftBudget,
    DraftOutcome,
    ForwardTiming,
    LatencyCurve,
    LatencyModel,
    Planner,
)

MAX_DEPTH = 6


def latency(row_ms: float = 2.0, base_ms: float = 40.0, first_ms: float = 4.0, further_ms: float = 2.0) -> LatencyModel:
    """A forward whose latency is linear in its rows, and draft steps that hardly depend on the number of sequences."""
    verify = {rows: (base_ms + row_ms * rows) / 1e3 for rows in (1, 2, 4, 8, 16, 32, 64)}
    return LatencyModel(
        LatencyCurve(verify),
        LatencyCurve({1: first_ms / 1e3, 8: 1.5 * first_ms / 1e3}),
        LatencyCurve({1: further_ms / 1e3}),
    )


def outcome(depth: int, probability: float, *, accepted: bool, greedy: bool = True) -> DraftOutcome:
    return DraftOutcome(depth, (probability,), 0 if accepted else None, greedy)


class Simulation:
    """A node with simulated time, whose draft tokens are accepted with a given probability at each depth."""

    def __init__(self, planner: Planner, truth: LatencyModel, sequences: int, seed: int = 0) -> None:
        self.planner, self.truth, self.sequences = planner, truth, sequences
        self.random = random.Random(seed)
        self.seconds = 0.0
        self.tokens = 0.0
        """Expected value: luck in single verify steps does not count."""
        self.depths: list[int] = []

    def run(self, verify_steps: int, probability: float) -> None:
        for _ in range(verify_steps):
            budget = self.planner.plan([True] * self.sequences)
            drafting = (budget.max_sequences or self.sequences) if budget.depth else 0
            outcomes = [outcome for _ in range(drafting) for outcome in self.draft(budget.depth, probability)]
            rows = self.sequences + drafting * budget.depth
            verify = ForwardTiming(rows, self.truth.predict_verify(rows) * self.random.uniform(0.9, 1.1))
            steps = [
                self.truth.predict_draft(drafting, i + 1) - self.truth.predict_draft(drafting, i)
                for i in range(budget.depth)
            ]
            drafts = [ForwardTiming(drafting, seconds) for seconds in steps]
            self.planner.observe(outcomes, verify, drafts, rows - self.sequences)
            self.seconds += verify.seconds + sum(steps)
            self.tokens += self.sequences + drafting * sum(probability**i for i in range(1, budget.depth + 1))
            self.depths.append(budget.depth if budget.max_sequences is None else 0)

    def draft(self, depth: int, probability: float) -> list[DraftOutcome]:
        """Outcomes of one draft up to the first rejected token."""
        outcomes = []
        for i in range(1, depth + 1):
            accepted = self.random.random() < probability
            outcomes.append(outcome(i, probability, accepted=accepted))
            if not accepted:
                break
        return outcomes

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def simulate(
    max_depth: int, sequences: int, probability: float, *, adaptive: bool = True, verify_steps: int = 1500
) -> Simulation:
    simulation = Simulation(Planner(latency(), max_depth, adaptive=adaptive), latency(), sequences)
    simulation.run(verify_steps, probability)
    return simulation


@pytest.mark.parametrize("sequences", [1, 8])
def test_a_draft_that_is_always_rejected_costs_at_most_three_percent(sequences: int) -> None:
    adaptive = simulate(MAX_DEPTH, sequences, probability=0.0)
    assert max(adaptive.depths) == 0
    assert adaptive.rate > 0.97 * sequences / latency().predict_verify(sequences)


@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("probability", [0.3, 0.5, 0.7, 0.9])
def test_adaptive_throughput_is_within_five_percent_of_the_best_fixed_depth(sequences: int, probability: float) -> None:
    fixed = [simulate(n, sequences, probability, adaptive=False).rate for n in range(1, MAX_DEPTH + 1)]
    best = max([*fixed, sequences / latency().predict_verify(sequences)])
    assert simulate(MAX_DEPTH, sequences, probability).rate > 0.95 * best


@pytest.mark.parametrize("sequences", [1, 8])
def test_depth_follows_a_change_of_acceptance_within_two_hundred_verify_steps(sequences: int) -> None:
    simulation = Simulation(Planner(latency(), MAX_DEPTH), latency(), sequences)
    simulation.run(600, 0.0)
    assert simulation.depths[-1] == 0
    simulation.run(200, 0.9)
    assert min(simulation.depths[-10:]) >= 3
    simulation.run(200, 0.0)
    assert max(simulation.depths[-10:]) == 0


def test_a_swap_causes_a_probe_in_the_next_verify_step() -> None:
    simulation = Simulation(Planner(latency(), MAX_DEPTH), latency(), sequences=4)
    simulation.run(500, 0.0)
    simulation.planner.request_probe()
    budget = simulation.planner.plan([True] * 4)
    assert (budget.max_sequences, budget.depth) == (1, 2)


def test_the_catch_up_of_a_probe_does_not_raise_the_expected_draft_latency() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    before = planner.estimate_throughput([True])
    for _ in range(300):
        if planner.plan([True]).depth:
            planner.observe(
                [], ForwardTiming(3, latency().predict_verify(3)), [ForwardTiming(1, 0.5), ForwardTiming(1, 0.002)], 2
            )
    assert planner.estimate_throughput([True]) == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize(("stall_ms", "rows"), [(0.5, 1), (2.0, 2), (31.0, 31), (1000.0, 128)])
def test_prompt_rows_extend_a_verify_step_by_the_allowed_stall_at_most(stall_ms: float, rows: int) -> None:
    line = LatencyModel(LatencyCurve({1: 0.021, 33: 0.053}), LatencyCurve({1: 0.002}), LatencyCurve({1: 0.002}))
    planner = Planner(line, MAX_DEPTH)
    assert planner.limit_prompt_rows(stall_ms / 1e3 + 1e-9, decode_rows=4, max_rows=128) == rows


def test_prompt_rows_follow_the_measured_forward_latency() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    before = planner.limit_prompt_rows(0.05, decode_rows=4, max_rows=128)
    for _ in range(50):
        planner.observe([], ForwardTiming(4, 4 * latency().predict_verify(4)), [], 0)
    assert planner.limit_prompt_rows(0.05, decode_rows=4, max_rows=128) < before / 2


def test_a_planner_that_is_not_adaptive_always_plans_the_maximum_depth() -> None:
    assert Planner(latency(), 5, adaptive=False).plan([True, False]) == DraftBudget(5)


def test_no_drafting_is_planned_without_speculating_sequences() -> None:
    assert Planner(latency(), MAX_DEPTH).plan([]) == DraftBudget(0)


def test_expensive_rows_lower_the_depth_and_raise_the_thresholds() -> None:
    budgets = []
    for row_ms in (0.5, 6.0):
        planner = Planner(latency(row_ms=row_ms), MAX_DEPTH)
        for _ in range(100):
            planner.observe([outcome(depth, 0.8, accepted=True) for depth in range(1, 4)], None, [], 0)
            planner.observe([outcome(1, 0.8, accepted=False)], None, [], 0)
        budgets.append(planner.plan([True] * 4))
    cheap, expensive = budgets
    assert cheap.depth >= expensive.depth > 0
    assert cheap.verify_threshold < expensive.verify_threshold
    assert cheap.verify_threshold <= cheap.draft_threshold


def test_acceptance_of_greedy_and_sampled_sequences_is_separate() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    for _ in range(200):
        seen = [outcome(1, 0.5, accepted=True), outcome(1, 0.5, accepted=False, greedy=False)]
        planner.observe(seen, None, [], 0)
    assert planner.acceptance[True].estimate_at_depth(1) > 0.9
    assert planner.acceptance[False].estimate_at_depth(1) < 0.1
    assert planner.plan([True]).depth > 0
    assert planner.plan([False]).depth == 0


def test_acceptance_depends_on_the_draft_probability() -> None:
    acceptance = AcceptanceModel(MAX_DEPTH)
    for _ in range(300):
        acceptance.update(outcome(1, 0.9, accepted=True), 1.0)
        acceptance.update(outcome(1, 0.15, accepted=False), 1.0)
    assert acceptance.estimate_for(0.92) > 0.9
    assert acceptance.estimate_for(0.12) < 0.1


def test_one_accepted_sibling_counts_as_accepted_at_its_depth() -> None:
    acceptance = AcceptanceModel(MAX_DEPTH)
    for _ in range(200):
        acceptance.update(DraftOutcome(1, (0.6, 0.15), 0, greedy=True), 1.0)
        acceptance.update(DraftOutcome(1, (0.6, 0.15), 1, greedy=True), 1.0)
    assert acceptance.estimate_at_depth(1) > 0.9
    assert acceptance.estimate_for(0.6) == pytest.approx(0.5, abs=0.1)
    assert acceptance.estimate_for(0.15) == pytest.approx(0.5, abs=0.1)


def test_a_slower_machine_changes_the_throughput_but_not_the_depth() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    simulation = Simulation(planner, latency(), sequences=4)
    simulation.run(400, 0.8)
    before = simulation.depths[-1]
    truth = latency(row_ms=4.0, base_ms=80.0, first_ms=8.0, further_ms=4.0)
    simulation.truth = truth
    simulation.run(400, 0.8)
    assert abs(simulation.depths[-1] - before) <= 1
    assert planner.estimate_throughput([True] * 4)[0] == pytest.approx(4 / truth.predict_verify(4), rel=0.1)


@given(
    knots=st.dictionaries(st.integers(1, 64), st.floats(1e-3, 1.0), min_size=1, max_size=6),
    seen=st.lists(st.tuples(st.integers(1, 80), st.floats(1e-3, 2.0)), max_size=40),
)
def test_a_latency_curve_stays_positive_at_its_knots(knots: dict[int, float], seen: list[tuple[int, float]]) -> None:
    curve = LatencyCurve(knots)
    for rows, seconds in seen:
        curve.update(rows, seconds, 0.5)
    assert all(curve.predict(rows) > 0 for rows in knots)


def test_a_latency_curve_learns_between_its_knots() -> None:
    curve = LatencyCurve({1: 1.0, 8: 1.0, 32: 1.0})
    for _ in range(200):
        for rows in (1, 4, 8):
            curve.update(rows, 0.1 * rows, 0.2)
    assert curve.predict(4) == pytest.approx(0.4, rel=0.05)
    assert curve.predict(32) == pytest.approx(1.0, rel=0.05)
