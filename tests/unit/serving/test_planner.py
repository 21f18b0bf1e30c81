"""How much a node drafts follows what it measures: latency, acceptance, and the requests at hand."""

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
    """A pass latency the same for every row; a drafting step hardly depends on the requests."""
    verify = {rows: (base_ms + row_ms * rows) / 1e3 for rows in (1, 2, 4, 8, 16, 32, 64)}
    return LatencyModel(
        LatencyCurve(verify),
        LatencyCurve({1: first_ms / 1e3, 8: 1.5 * first_ms / 1e3}),
        LatencyCurve({1: further_ms / 1e3}),
    )


def outcome(depth: int, probability: float, *, accepted: bool, greedy: bool = True) -> DraftOutcome:
    return DraftOutcome(depth, (probability,), 0 if accepted else None, greedy)


class Simulation:
    """A node whose draft is accepted with a given chance at each depth, on a clock of its own."""

    def __init__(self, planner: Planner, truth: LatencyModel, requests: int, seed: int = 0) -> None:
        self.planner, self.truth, self.requests = planner, truth, requests
        self.random = random.Random(seed)
        self.seconds = 0.0
        self.tokens = 0.0
        """Expected of what was drafted: the luck of single tokens is left out."""
        self.depths: list[int] = []

    def run(self, verify_steps: int, chance: float) -> None:
        for _ in range(verify_steps):
            plan = self.planner.plan([True] * self.requests)
            drafting = (plan.max_sequences or self.requests) if plan.depth else 0
            outcomes = [outcome for _ in range(drafting) for outcome in self.draft(plan.depth, chance)]
            rows = self.requests + drafting * plan.depth
            verify = ForwardTiming(rows, self.truth.predict_verify(rows) * self.random.uniform(0.9, 1.1))
            steps = [
                self.truth.predict_draft(drafting, i + 1) - self.truth.predict_draft(drafting, i)
                for i in range(plan.depth)
            ]
            drafts = [ForwardTiming(drafting, seconds) for seconds in steps]
            self.planner.observe(outcomes, verify, drafts, rows - self.requests)
            self.seconds += verify.seconds + sum(steps)
            self.tokens += self.requests + drafting * sum(chance**i for i in range(1, plan.depth + 1))
            self.depths.append(plan.depth if plan.max_sequences is None else 0)

    def draft(self, depth: int, chance: float) -> list[DraftOutcome]:
        """The tokens of one draft up to the first that is rejected."""
        outcomes = []
        for i in range(1, depth + 1):
            accepted = self.random.random() < chance
            outcomes.append(outcome(i, chance, accepted=accepted))
            if not accepted:
                break
        return outcomes

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def simulate(
    max_depth: int, requests: int, chance: float, *, adaptive: bool = True, verify_steps: int = 1500
) -> Simulation:
    simulation = Simulation(Planner(latency(), max_depth, adaptive=adaptive), latency(), requests)
    simulation.run(verify_steps, chance)
    return simulation


@pytest.mark.parametrize("requests", [1, 8])
def test_a_draft_that_is_never_accepted_costs_at_most_three_percent(requests: int) -> None:
    adaptive = simulate(MAX_DEPTH, requests, chance=0.0)
    assert max(adaptive.depths) == 0
    assert adaptive.rate > 0.97 * requests / latency().predict_verify(requests)


@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7, 0.9])
def test_the_measured_choice_is_within_five_percent_of_the_best_fixed_length(requests: int, chance: float) -> None:
    fixed = [simulate(n, requests, chance, adaptive=False).rate for n in range(1, MAX_DEPTH + 1)]
    best = max([*fixed, requests / latency().predict_verify(requests)])
    assert simulate(MAX_DEPTH, requests, chance).rate > 0.95 * best


@pytest.mark.parametrize("requests", [1, 8])
def test_a_change_of_acceptance_is_followed_within_two_hundred_verify_steps(requests: int) -> None:
    simulation = Simulation(Planner(latency(), MAX_DEPTH), latency(), requests)
    simulation.run(600, 0.0)
    assert simulation.depths[-1] == 0
    simulation.run(200, 0.9)
    assert min(simulation.depths[-10:]) >= 3
    simulation.run(200, 0.0)
    assert max(simulation.depths[-10:]) == 0


def test_a_swapped_in_version_is_probed_in_the_next_verify_step() -> None:
    simulation = Simulation(Planner(latency(), MAX_DEPTH), latency(), requests=4)
    simulation.run(500, 0.0)
    simulation.planner.request_probe()
    plan = simulation.planner.plan([True] * 4)
    assert (plan.max_sequences, plan.depth) == (1, 2)


def test_what_a_probe_takes_to_catch_up_is_not_held_against_drafting() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    before = planner.estimate_throughput([True])
    for _ in range(300):
        if planner.plan([True]).depth:
            planner.observe(
                [], ForwardTiming(3, latency().predict_verify(3)), [ForwardTiming(1, 0.5), ForwardTiming(1, 0.002)], 2
            )
    assert planner.estimate_throughput([True]) == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize(("stall_ms", "rows"), [(0.5, 1), (2.0, 2), (31.0, 31), (1000.0, 128)])
def test_prompts_are_cut_so_that_a_verify_step_becomes_longer_by_what_is_allowed(stall_ms: float, rows: int) -> None:
    line = LatencyModel(LatencyCurve({1: 0.021, 33: 0.053}), LatencyCurve({1: 0.002}), LatencyCurve({1: 0.002}))
    planner = Planner(line, MAX_DEPTH)
    assert planner.limit_prompt_rows(stall_ms / 1e3 + 1e-9, decode_rows=4, max_rows=128) == rows


def test_pieces_of_prompts_follow_what_passes_turn_out_to_take() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    before = planner.limit_prompt_rows(0.05, decode_rows=4, max_rows=128)
    for _ in range(50):
        planner.observe([], ForwardTiming(4, 4 * latency().predict_verify(4)), [], 0)
    assert planner.limit_prompt_rows(0.05, decode_rows=4, max_rows=128) < before / 2


def test_without_adaptation_every_verify_step_drafts_all_it_may() -> None:
    assert Planner(latency(), 5, adaptive=False).plan([True, False]) == DraftBudget(5)


def test_nothing_is_planned_where_no_request_speculates() -> None:
    assert Planner(latency(), MAX_DEPTH).plan([]) == DraftBudget(0)


def test_dear_rows_make_the_plan_shorter_and_a_token_worth_less() -> None:
    plans = []
    for row_ms in (0.5, 6.0):
        planner = Planner(latency(row_ms=row_ms), MAX_DEPTH)
        for _ in range(100):
            planner.observe([outcome(depth, 0.8, accepted=True) for depth in range(1, 4)], None, [], 0)
            planner.observe([outcome(1, 0.8, accepted=False)], None, [], 0)
        plans.append(planner.plan([True] * 4))
    cheap, dear = plans
    assert cheap.depth >= dear.depth > 0
    assert cheap.verify_threshold < dear.verify_threshold
    assert cheap.verify_threshold <= cheap.draft_threshold


def test_greedy_and_sampled_requests_are_learned_apart() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    for _ in range(200):
        seen = [outcome(1, 0.5, accepted=True), outcome(1, 0.5, accepted=False, greedy=False)]
        planner.observe(seen, None, [], 0)
    assert planner.acceptance[True].estimate_at_depth(1) > 0.9
    assert planner.acceptance[False].estimate_at_depth(1) < 0.1
    assert planner.plan([True]).depth > 0
    assert planner.plan([False]).depth == 0


def test_tokens_that_the_draft_is_sure_of_are_told_from_the_others() -> None:
    acceptance = AcceptanceModel(MAX_DEPTH)
    for _ in range(300):
        acceptance.update(outcome(1, 0.9, accepted=True), 1.0)
        acceptance.update(outcome(1, 0.15, accepted=False), 1.0)
    assert acceptance.estimate_for(0.92) > 0.9
    assert acceptance.estimate_for(0.12) < 0.1


def test_of_siblings_one_accepted_makes_the_depth_a_success() -> None:
    acceptance = AcceptanceModel(MAX_DEPTH)
    for _ in range(200):
        acceptance.update(DraftOutcome(1, (0.6, 0.15), 0, greedy=True), 1.0)
        acceptance.update(DraftOutcome(1, (0.6, 0.15), 1, greedy=True), 1.0)
    assert acceptance.estimate_at_depth(1) > 0.9
    assert acceptance.estimate_for(0.6) == pytest.approx(0.5, abs=0.1)
    assert acceptance.estimate_for(0.15) == pytest.approx(0.5, abs=0.1)


def test_a_slower_machine_changes_the_pace_and_not_the_choice() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    simulation = Simulation(planner, latency(), requests=4)
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
def test_a_curve_stays_positive_at_its_knots_whatever_it_sees(
    knots: dict[int, float], seen: list[tuple[int, float]]
) -> None:
    curve = LatencyCurve(knots)
    for rows, seconds in seen:
        curve.update(rows, seconds, 0.5)
    assert all(curve.predict(rows) > 0 for rows in knots)


def test_a_curve_learns_what_it_sees_between_its_knots() -> None:
    curve = LatencyCurve({1: 1.0, 8: 1.0, 32: 1.0})
    for _ in range(200):
        for rows in (1, 4, 8):
            curve.update(rows, 0.1 * rows, 0.2)
    assert curve.predict(4) == pytest.approx(0.4, rel=0.05)
    assert curve.predict(32) == pytest.approx(1.0, rel=0.05)
