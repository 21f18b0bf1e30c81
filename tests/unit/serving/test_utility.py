"""How much a node drafts follows what it measures: costs, acceptance, and the requests at hand."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.planner import Acceptance, Costs, Curve, Plan, Timing, Trial, Utility

LONGEST = 6


def costs(row_ms: float = 2.0, base_ms: float = 40.0, first_ms: float = 4.0, further_ms: float = 2.0) -> Costs:
    """A pass costs the same for every row; a drafting step hardly depends on the requests."""
    verify = {rows: (base_ms + row_ms * rows) / 1e3 for rows in (1, 2, 4, 8, 16, 32, 64)}
    return Costs(Curve(verify), Curve({1: first_ms / 1e3, 8: 1.5 * first_ms / 1e3}), Curve({1: further_ms / 1e3}))


def trial(depth: int, probability: float, *, accepted: bool, greedy: bool = True) -> Trial:
    return Trial(depth, (probability,), 0 if accepted else None, greedy)


class Simulation:
    """A node whose draft is accepted with a given chance at each depth, on a clock of its own."""

    def __init__(self, utility: Utility, truth: Costs, requests: int, seed: int = 0) -> None:
        self.utility, self.truth, self.requests = utility, truth, requests
        self.random = random.Random(seed)
        self.seconds = 0.0
        self.tokens = 0.0
        """Expected of what was drafted: the luck of single tokens is left out."""
        self.depths: list[int] = []

    def run(self, verify_steps: int, chance: float) -> None:
        for _ in range(verify_steps):
            plan = self.utility.plan([True] * self.requests)
            drafting = (plan.requests or self.requests) if plan.depth else 0
            trials = [trial for _ in range(drafting) for trial in self.draft(plan.depth, chance)]
            rows = self.requests + drafting * plan.depth
            verify = Timing(rows, self.truth.verify(rows) * self.random.uniform(0.9, 1.1))
            steps = [self.truth.draft(drafting, i + 1) - self.truth.draft(drafting, i) for i in range(plan.depth)]
            drafts = [Timing(drafting, seconds) for seconds in steps]
            self.utility.observe(trials, verify, drafts, rows - self.requests)
            self.seconds += verify.seconds + sum(steps)
            self.tokens += self.requests + drafting * sum(chance**i for i in range(1, plan.depth + 1))
            self.depths.append(plan.depth if plan.requests is None else 0)

    def draft(self, depth: int, chance: float) -> list[Trial]:
        """The tokens of one draft up to the first that is rejected."""
        trials = []
        for i in range(1, depth + 1):
            accepted = self.random.random() < chance
            trials.append(trial(i, chance, accepted=accepted))
            if not accepted:
                break
        return trials

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def simulate(
    longest: int, requests: int, chance: float, *, adaptive: bool = True, verify_steps: int = 1500
) -> Simulation:
    simulation = Simulation(Utility(costs(), longest, adaptive=adaptive), costs(), requests)
    simulation.run(verify_steps, chance)
    return simulation


@pytest.mark.parametrize("requests", [1, 8])
def test_a_draft_that_is_never_accepted_costs_at_most_three_percent(requests: int) -> None:
    adaptive = simulate(LONGEST, requests, chance=0.0)
    assert max(adaptive.depths) == 0
    assert adaptive.rate > 0.97 * requests / costs().verify(requests)


@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7, 0.9])
def test_the_measured_choice_is_within_five_percent_of_the_best_fixed_length(requests: int, chance: float) -> None:
    fixed = [simulate(n, requests, chance, adaptive=False).rate for n in range(1, LONGEST + 1)]
    best = max([*fixed, requests / costs().verify(requests)])
    assert simulate(LONGEST, requests, chance).rate > 0.95 * best


@pytest.mark.parametrize("requests", [1, 8])
def test_a_change_of_acceptance_is_followed_within_two_hundred_verify_steps(requests: int) -> None:
    simulation = Simulation(Utility(costs(), LONGEST), costs(), requests)
    simulation.run(600, 0.0)
    assert simulation.depths[-1] == 0
    simulation.run(200, 0.9)
    assert min(simulation.depths[-10:]) >= 3
    simulation.run(200, 0.0)
    assert max(simulation.depths[-10:]) == 0


def test_a_swapped_in_version_is_probed_in_the_next_verify_step() -> None:
    simulation = Simulation(Utility(costs(), LONGEST), costs(), requests=4)
    simulation.run(500, 0.0)
    simulation.utility.renew()
    plan = simulation.utility.plan([True] * 4)
    assert (plan.requests, plan.depth) == (1, 2)


def test_what_a_probe_takes_to_catch_up_is_not_held_against_drafting() -> None:
    utility = Utility(costs(), LONGEST)
    before = utility.rates([True])
    for _ in range(300):
        if utility.plan([True]).depth:
            utility.observe([], Timing(3, costs().verify(3)), [Timing(1, 0.5), Timing(1, 0.002)], 2)
    assert utility.rates([True]) == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize(("stall_ms", "rows"), [(0.5, 1), (2.0, 2), (31.0, 31), (1000.0, 128)])
def test_prompts_are_cut_so_that_a_verify_step_becomes_longer_by_what_is_allowed(stall_ms: float, rows: int) -> None:
    line = Costs(Curve({1: 0.021, 33: 0.053}), Curve({1: 0.002}), Curve({1: 0.002}))
    utility = Utility(line, LONGEST)
    assert utility.rows_within(stall_ms / 1e3 + 1e-9, beside=4, most=128) == rows


def test_pieces_of_prompts_follow_what_passes_turn_out_to_take() -> None:
    utility = Utility(costs(), LONGEST)
    before = utility.rows_within(0.05, beside=4, most=128)
    for _ in range(50):
        utility.observe([], Timing(4, 4 * costs().verify(4)), [], 0)
    assert utility.rows_within(0.05, beside=4, most=128) < before / 2


def test_without_adaptation_every_verify_step_drafts_all_it_may() -> None:
    assert Utility(costs(), 5, adaptive=False).plan([True, False]) == Plan(5)


def test_nothing_is_planned_where_no_request_speculates() -> None:
    assert Utility(costs(), LONGEST).plan([]) == Plan(0)


def test_dear_rows_make_the_plan_shorter_and_a_token_worth_less() -> None:
    plans = []
    for row_ms in (0.5, 6.0):
        utility = Utility(costs(row_ms=row_ms), LONGEST)
        for _ in range(100):
            utility.observe([trial(depth, 0.8, accepted=True) for depth in range(1, 4)], None, [], 0)
            utility.observe([trial(1, 0.8, accepted=False)], None, [], 0)
        plans.append(utility.plan([True] * 4))
    cheap, dear = plans
    assert cheap.depth >= dear.depth > 0
    assert cheap.row_worth < dear.row_worth
    assert cheap.row_worth <= cheap.step_worth


def test_greedy_and_sampled_requests_are_learned_apart() -> None:
    utility = Utility(costs(), LONGEST)
    for _ in range(200):
        seen = [trial(1, 0.5, accepted=True), trial(1, 0.5, accepted=False, greedy=False)]
        utility.observe(seen, None, [], 0)
    assert utility.acceptance[True].at(1) > 0.9
    assert utility.acceptance[False].at(1) < 0.1
    assert utility.plan([True]).depth > 0
    assert utility.plan([False]).depth == 0


def test_tokens_that_the_draft_is_sure_of_are_told_from_the_others() -> None:
    acceptance = Acceptance(LONGEST)
    for _ in range(300):
        acceptance.learn(trial(1, 0.9, accepted=True), 1.0)
        acceptance.learn(trial(1, 0.15, accepted=False), 1.0)
    assert acceptance.of(0.92) > 0.9
    assert acceptance.of(0.12) < 0.1


def test_of_siblings_one_accepted_makes_the_depth_a_success() -> None:
    acceptance = Acceptance(LONGEST)
    for _ in range(200):
        acceptance.learn(Trial(1, (0.6, 0.15), 0, greedy=True), 1.0)
        acceptance.learn(Trial(1, (0.6, 0.15), 1, greedy=True), 1.0)
    assert acceptance.at(1) > 0.9
    assert acceptance.of(0.6) == pytest.approx(0.5, abs=0.1)
    assert acceptance.of(0.15) == pytest.approx(0.5, abs=0.1)


def test_a_slower_machine_changes_the_pace_and_not_the_choice() -> None:
    utility = Utility(costs(), LONGEST)
    simulation = Simulation(utility, costs(), requests=4)
    simulation.run(400, 0.8)
    before = simulation.depths[-1]
    truth = costs(row_ms=4.0, base_ms=80.0, first_ms=8.0, further_ms=4.0)
    simulation.truth = truth
    simulation.run(400, 0.8)
    assert abs(simulation.depths[-1] - before) <= 1
    assert utility.rates([True] * 4)[0] == pytest.approx(4 / truth.verify(4), rel=0.1)


@given(
    knots=st.dictionaries(st.integers(1, 64), st.floats(1e-3, 1.0), min_size=1, max_size=6),
    seen=st.lists(st.tuples(st.integers(1, 80), st.floats(1e-3, 2.0)), max_size=40),
)
def test_a_curve_stays_positive_at_its_knots_whatever_it_sees(
    knots: dict[int, float], seen: list[tuple[int, float]]
) -> None:
    curve = Curve(knots)
    for rows, seconds in seen:
        curve.learn(rows, seconds, 0.5)
    assert all(curve.at(rows) > 0 for rows in knots)


def test_a_curve_learns_what_it_sees_between_its_knots() -> None:
    curve = Curve({1: 1.0, 8: 1.0, 32: 1.0})
    for _ in range(200):
        for rows in (1, 4, 8):
            curve.learn(rows, 0.1 * rows, 0.2)
    assert curve.at(4) == pytest.approx(0.4, rel=0.05)
    assert curve.at(32) == pytest.approx(1.0, rel=0.05)
