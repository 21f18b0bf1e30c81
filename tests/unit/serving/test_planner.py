"""The planner's drafts follow measured latency, measured acceptance, and the sequences that may draft."""

import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.trace.record import DraftSource
from serving.planner.acceptance_model import AcceptanceModel, DraftOutcome, SpeculatorModel, SpeculatorOutcome
from serving.planner.latency_model import ForwardTiming, LatencyCurve, LatencyModel
from serving.planner.planner import DraftBudget, DraftPlan, Planner, SequenceOutlook

MAX_DEPTH = 6
ALONE = SequenceOutlook(greedy=True)
"""A greedy sequence without a suffix draft."""
reached = partial(SpeculatorOutcome, greedy=True)
"""How far the two drafts of a greedy sequence were accepted."""


def latency(
    row_ms: float = 2.0, base_ms: float = 40.0, first_ms: float = 4.0, further_ms: float = 2.0, catch_up_us: float = 0.0
) -> LatencyModel:
    """A forward whose latency is linear in its rows, and draft steps that hardly depend on the number of sequences."""
    return LatencyModel(
        LatencyCurve({rows: (base_ms + row_ms * rows) / 1e3 for rows in (1, 2, 4, 8, 16, 32, 64)}),
        LatencyCurve({1: 0.0}),
        LatencyCurve({1: first_ms / 1e3, 8: 1.5 * first_ms / 1e3}),
        LatencyCurve({1: further_ms / 1e3}),
        catch_up_us / 1e6,
    )


def outcome(probability: float, *, accepted: bool, greedy: bool = True, match_length: int = 0) -> DraftOutcome:
    source = DraftSource.SUFFIX if match_length else DraftSource.SPECULATOR
    return DraftOutcome(source, greedy, ((probability, match_length),), 0 if accepted else None)


def count_accepted(draws: random.Random, probability: float, depth: int) -> int:
    """Draw how many tokens of a chain are accepted."""
    accepted = 0
    while accepted < depth and draws.random() < probability:
        accepted += 1
    return accepted


class Simulation:
    """A node with simulated time. Draft tokens are accepted with one probability for each drafter.

    The tokens of a suffix draft stand for themselves: the speculator proposes the same tokens where it is right too.
    """

    def __init__(self, planner: Planner, truth: LatencyModel, sequences: int, suffix_depth: int = 0) -> None:
        self.planner, self.truth, self.sequences, self.suffix_depth = planner, truth, sequences, suffix_depth
        self.random = random.Random(0)
        self.seconds = 0.0
        self.tokens = 0
        self.depths: list[int] = []

    def run(self, verify_steps: int, speculator: float, suffix: float = 0.0) -> None:
        for _ in range(verify_steps):
            self.run_step(speculator, suffix)

    def run_step(self, speculator: float, suffix: float) -> None:
        planner, count = self.planner, self.sequences
        chances = [planner.suffix[True].estimate(0.5, 4) ** i for i in range(1, self.suffix_depth + 1)]
        outlooks = [SequenceOutlook(greedy=True, chances=chances)] * count
        selected = planner.select(count, sorted(chances * count, reverse=True))
        plan = planner.plan(count, outlooks)
        suffix_hits = [count_accepted(self.random, suffix, self.suffix_depth) for _ in range(count)]
        drafting = len(plan.drafting) if plan.budget.depth else 0
        hits = [count_accepted(self.random, speculator, plan.budget.depth) for _ in range(drafting)]
        kept = selected // count
        accepted = [min(hit, kept) for hit in suffix_hits]
        gains = [
            reached(
                confidence=outlooks[0].confidence,
                suffix_tokens=accepted[i],
                speculator_tokens=hit,
                drafted_depth=plan.budget.depth,
            )
            for i, hit in enumerate(hits)
        ]
        outcomes = [
            outcome(0.5, accepted=depth < hit, match_length=4)
            for hit in suffix_hits
            for depth in range(min(hit + 1, self.suffix_depth))
        ]
        planner.observe_drafts(outcomes, gains)
        rows = count + selected + drafting * plan.budget.depth
        verify = ForwardTiming(count, rows, self.truth.predict_verify(count, rows) * self.random.uniform(0.9, 1.1))
        steps = [
            self.truth.predict_draft(drafting, i + 1) - self.truth.predict_draft(drafting, i)
            for i in range(plan.budget.depth)
        ]
        tokens = count + sum(max(a, hits[i] if i < drafting else 0) for i, a in enumerate(accepted))
        timings = [ForwardTiming(drafting, drafting, seconds) for seconds in steps]
        planner.observe_latency(plan, tokens, verify, timings)
        self.seconds += verify.seconds + sum(steps)
        self.tokens += tokens
        self.depths.append(planner.depth)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def simulate(
    max_depth: int, sequences: int, speculator: float, suffix: float = 0.0, *, suffix_depth: int = 0
) -> Simulation:
    simulation = Simulation(Planner(latency(), max_depth), latency(), sequences, suffix_depth)
    simulation.run(1500, speculator, suffix)
    return simulation


def simulate_fixed(depth: int, sequences: int, speculator: float) -> float:
    """Return the throughput of a node that always drafts to one depth."""
    if not depth:
        return sequences / latency().predict_verify(sequences, sequences)
    simulation = Simulation(Planner(latency(), depth, adaptive=False), latency(), sequences)
    simulation.run(1500, speculator)
    return simulation.rate


@pytest.mark.parametrize("sequences", [1, 8])
def test_a_draft_that_is_always_rejected_costs_at_most_three_percent(sequences: int) -> None:
    adaptive = simulate(MAX_DEPTH, sequences, speculator=0.0)
    assert max(adaptive.depths) == 0
    assert adaptive.rate > 0.97 * simulate_fixed(0, sequences, 0.0)


@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize("probability", [0.3, 0.5, 0.7, 0.9])
def test_adaptive_throughput_is_within_five_percent_of_the_best_fixed_depth(sequences: int, probability: float) -> None:
    best = max(simulate_fixed(depth, sequences, probability) for depth in range(MAX_DEPTH + 1))
    assert simulate(MAX_DEPTH, sequences, probability).rate > 0.95 * best


@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize(("speculator", "suffix"), [(0.0, 0.8), (0.8, 0.0), (0.8, 0.1), (0.2, 0.9), (0.6, 0.6)])
def test_both_drafters_are_within_five_percent_of_the_better_one(
    sequences: int, speculator: float, suffix: float
) -> None:
    both = simulate(MAX_DEPTH, sequences, speculator, suffix, suffix_depth=8).rate
    alone = [
        simulate(MAX_DEPTH, sequences, speculator).rate,
        simulate(MAX_DEPTH, sequences, 0.0, suffix, suffix_depth=8).rate,
    ]
    assert both > 0.95 * max(alone)


def test_the_speculator_does_not_draft_where_the_suffix_draft_is_worth_more() -> None:
    confident = simulate(MAX_DEPTH, 1, speculator=0.5, suffix=0.97, suffix_depth=8)
    assert max(confident.depths[-100:]) == 0
    unsure = simulate(MAX_DEPTH, 1, speculator=0.8, suffix=0.1, suffix_depth=8)
    assert min(unsure.depths[-100:]) > 0


@pytest.mark.parametrize("sequences", [1, 8])
def test_depth_follows_a_change_of_acceptance_within_two_hundred_verify_steps(sequences: int) -> None:
    simulation = Simulation(Planner(latency(), MAX_DEPTH), latency(), sequences)
    simulation.run(600, 0.0)
    assert simulation.depths[-1] == 0
    simulation.run(200, 0.9)
    assert min(simulation.depths[-10:]) >= 3
    simulation.run(200, 0.0)
    assert max(simulation.depths[-10:]) == 0


def test_a_new_version_has_no_acceptance_and_is_probed_in_the_next_verify_step() -> None:
    simulation = Simulation(Planner(latency(), MAX_DEPTH), latency(), sequences=4, suffix_depth=2)
    simulation.run(500, 0.9, 0.7)
    simulation.suffix_depth = 0
    simulation.run(100, 0.9)
    planner = simulation.planner
    assert len(planner.plan(4, [ALONE] * 4).drafting) == 4
    suffix = planner.suffix[True].estimate(0.5, 4)
    planner.start_version()
    assert planner.suffix[True].estimate(0.5, 4) == suffix > 0.6
    plan = planner.plan(4, [ALONE] * 4)
    assert (planner.depth, len(plan.drafting), plan.budget.depth) == (0, 1, 2)


def test_a_probe_drafts_for_a_sequence_without_a_suffix_draft_that_has_the_fewest_unseen_tokens() -> None:
    outlooks = [
        SequenceOutlook(greedy=True, chances=[0.9], catch_up=1),
        SequenceOutlook(greedy=True, chances=(), catch_up=9),
        SequenceOutlook(greedy=True, chances=(), catch_up=3),
    ]
    plans = [Planner(latency(), MAX_DEPTH).plan(3, outlooks)]
    assert [list(plan.drafting) for plan in plans] == [[2]]


def test_a_probe_follows_when_the_speculator_has_read_its_sequence() -> None:
    planner = Planner(latency(catch_up_us=100.0), MAX_DEPTH, max_prefill_stall=0.01)
    plans = [planner.plan(2, [SequenceOutlook(greedy=True, catch_up=left)] * 2) for left in (250, 150, 50)]
    assert [(plan.drafting, plan.catch_up) for plan in plans] == [([], {0: 100}), ([], {0: 100}), ([0], {0: 50})]
    until_next = next(i for i in range(1, 99) if planner.plan(1, [ALONE]).drafting)
    assert until_next == 4, "the reading of the probe does not defer the next one"


def test_the_catch_up_of_a_probe_does_not_raise_the_expected_draft_latency() -> None:
    model = latency()
    planner = Planner(model, MAX_DEPTH)
    before = model.predict_draft(1, 2)
    for _ in range(300):
        plan = planner.plan(1, [ALONE])
        if plan.budget.depth:
            verify = ForwardTiming(1, 3, latency().predict_verify(1, 3))
            planner.observe_latency(plan, 1, verify, [ForwardTiming(1, 1, 0.5), ForwardTiming(1, 1, 0.002)])
    assert model.predict_draft(1, 2) == before


@pytest.mark.parametrize(("stall_ms", "rows"), [(0.5, 1), (2.0, 2), (31.0, 31), (1000.0, 128)])
def test_prompt_rows_extend_a_verify_step_by_the_allowed_stall_at_most(stall_ms: float, rows: int) -> None:
    line = LatencyCurve({1: 0.021, 33: 0.053})
    model = LatencyModel(line, LatencyCurve({1: 0.0}), line, line)
    planner = Planner(model, MAX_DEPTH, max_prefill_stall=stall_ms / 1e3 + 1e-9)
    assert planner.limit_prompt_rows(decode_rows=4, max_rows=128) == rows


def test_prompt_rows_follow_the_measured_forward_latency() -> None:
    planner = Planner(latency(), MAX_DEPTH, max_prefill_stall=0.05)
    before = planner.limit_prompt_rows(decode_rows=4, max_rows=128)
    for _ in range(50):
        timing = ForwardTiming(4, 4, 4 * latency().predict_verify(4, 4))
        planner.observe_latency(DraftPlan((), DraftBudget(0)), 4, timing, [])
    assert planner.limit_prompt_rows(decode_rows=4, max_rows=128) < before / 2


@given(
    unread=st.lists(st.integers(0, 400), min_size=1, max_size=6),
    stall_ms=st.floats(0.1, 100),
    row_us=st.floats(0, 2000),
    adaptive=st.booleans(),
)
def test_target_and_speculator_together_read_prompts_within_the_allowed_stall(
    unread: list[int], stall_ms: float, row_us: float, adaptive: bool
) -> None:
    """Until the speculator has read everything. A sequence drafts when it is read, and not before."""
    model = latency(catch_up_us=row_us)
    planner = Planner(model, MAX_DEPTH, adaptive=adaptive, max_prefill_stall=stall_ms / 1e3)
    accepted = reached(confidence=0.0, suffix_tokens=0, speculator_tokens=MAX_DEPTH, drafted_depth=MAX_DEPTH)
    for _ in range(60):
        planner.observe_drafts([], [accepted])
    drafted: set[int] = set()
    steps = 0
    while len(drafted) < len(unread):
        plan = planner.plan(len(unread), [SequenceOutlook(greedy=True, catch_up=rows) for rows in unread])
        read = sum(plan.catch_up.values())
        prompt = planner.limit_prompt_rows(decode_rows=8, max_rows=128, catch_up=read)
        seconds = read * model.catch_up_row
        assert read <= 16 or seconds <= stall_ms / 1e3 + 1e-9
        if prompt > 1:
            seconds += model.predict_verify(1, 8 + prompt) - model.predict_verify(1, 8)
            assert seconds <= stall_ms / 1e3 + 1e-9
        for i, rows in plan.catch_up.items():
            assert 0 < rows <= unread[i]
            unread[i] -= rows
        assert {i for i, rows in enumerate(unread) if rows == 0} == set(plan.drafting)
        drafted.update(plan.drafting)
        steps += 1
        assert steps <= 1 + 6 * 400 / 16, "it catches up"


def test_a_planner_that_is_not_adaptive_drafts_to_the_maximum_depth_and_verifies_all() -> None:
    planner = Planner(latency(), 5, adaptive=False)
    plan = planner.plan(2, [ALONE, ALONE])
    assert (list(plan.drafting), plan.budget) == ([0, 1], DraftBudget(5))
    assert (planner.select(2, [0.1, 0.0]), planner.limit_suffix_drafts(2)) == (2, 0.0)


def test_no_drafting_is_planned_without_speculating_sequences() -> None:
    plan = Planner(latency(), MAX_DEPTH).plan(3, [])
    assert (list(plan.drafting), plan.budget.depth) == ([], 0)


def test_expensive_rows_lower_the_depth_and_raise_the_thresholds() -> None:
    budgets = []
    for row_ms in (0.5, 6.0):
        planner = Planner(latency(row_ms=row_ms), MAX_DEPTH)
        for _ in range(100):
            planner.observe_drafts(
                [], [reached(confidence=0.0, suffix_tokens=0, speculator_tokens=2, drafted_depth=3)] * 3
            )
        budgets.append(planner.plan(4, [ALONE] * 4).budget)
    cheap, expensive = budgets
    assert cheap.depth >= expensive.depth > 0
    assert cheap.verify_threshold < expensive.verify_threshold
    assert cheap.verify_threshold <= cheap.draft_threshold
    for budget in budgets:
        assert budget.sibling_threshold == budget.verify_threshold


def test_a_deeper_draft_than_planned_has_siblings_only_where_they_are_worth_a_row() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    for _ in range(100):
        planner.observe_drafts([], [reached(confidence=0.0, suffix_tokens=0, speculator_tokens=2, drafted_depth=3)])
    budgets = [planner.plan(1, [ALONE]).budget for _ in range(12)]
    assert len({budget.depth for budget in budgets}) == 2
    assert len({budget.sibling_threshold for budget in budgets}) == 1
    assert 0 < budgets[0].sibling_threshold < 1


def test_selection_stops_at_the_row_where_a_forward_becomes_expensive() -> None:
    """Rows are cheap up to the 14th, as inside the tile of a matrix kernel, and dear from the 15th on."""
    rows = LatencyCurve({1: 0.010, 14: 0.0113, 15: 0.0161, 64: 0.251})
    planner = Planner(LatencyModel(rows, LatencyCurve({1: 0.0}), rows, rows), MAX_DEPTH)
    assert planner.select(4, [0.5] * 40) == 10
    assert planner.select(4, [0.01] * 40) == 0


def test_a_candidate_behind_an_expensive_row_is_selected_if_enough_follow() -> None:
    rows = LatencyCurve({1: 0.010, 2: 0.020, 3: 0.0201, 64: 0.0262})
    planner = Planner(LatencyModel(rows, LatencyCurve({1: 0.0}), rows, rows), MAX_DEPTH)
    assert planner.select(1, [0.9]) == 0
    assert planner.select(1, [0.9] * 20) == 20


@given(chances=st.lists(st.floats(0, 1), max_size=40), sequences=st.integers(1, 16), row_ms=st.floats(0.01, 50))
def test_no_selection_has_a_higher_value_than_the_chosen_one(
    chances: list[float], sequences: int, row_ms: float
) -> None:
    model, ranked = latency(row_ms=row_ms), sorted(chances, reverse=True)
    planner = Planner(model, MAX_DEPTH)
    price = sequences / model.predict_verify(sequences, sequences)

    def value(count: int) -> float:
        return sum(ranked[:count]) - price * model.predict_verify(sequences, sequences + count)

    chosen = planner.select(sequences, ranked)
    assert value(chosen) == pytest.approx(max(map(value, range(len(ranked) + 1))))


def test_acceptance_of_greedy_and_sampled_sequences_is_separate() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    for _ in range(200):
        planner.observe_drafts(
            [
                outcome(0.5, accepted=True),
                outcome(0.5, accepted=False, greedy=False),
                outcome(0.5, accepted=False, match_length=4),
            ],
            [
                reached(confidence=0.0, suffix_tokens=0, speculator_tokens=3, drafted_depth=3),
                SpeculatorOutcome(greedy=False, confidence=0.0, suffix_tokens=0, speculator_tokens=0, drafted_depth=3),
            ],
        )
    assert planner.speculator[True].estimate(0.5) > 0.9
    assert planner.speculator[False].estimate(0.5) < 0.1
    assert planner.suffix[True].estimate(0.5, 4) < 0.1
    assert planner.plan(1, [ALONE]).budget.depth > 0
    planner.plan(1, [SequenceOutlook(greedy=False)])
    assert planner.depth == 0


def test_sampled_sequences_are_planned_like_greedy_ones_with_the_same_acceptance() -> None:
    plans = []
    for greedy in (True, False):
        planner, gain = Planner(latency(row_ms=6.0), MAX_DEPTH), SpeculatorOutcome(greedy, 0.0, 0, 2, MAX_DEPTH)
        for _ in range(100):
            planner.observe_drafts([], [gain] * 3)
        plans.append((planner.plan(4, [SequenceOutlook(greedy)] * 4), planner.throughput))
    assert plans[0] == plans[1]


def test_acceptance_depends_on_the_draft_probability_and_on_the_length_of_the_match() -> None:
    acceptance = AcceptanceModel()
    for _ in range(300):
        acceptance.update(outcome(0.9, accepted=True))
        acceptance.update(outcome(0.15, accepted=False))
        acceptance.update(outcome(0.5, accepted=True, match_length=9))
        acceptance.update(outcome(0.5, accepted=False, match_length=2))
    assert acceptance.estimate(0.92) > 0.9
    assert acceptance.estimate(0.12) < 0.1
    assert acceptance.estimate(0.5, 8) == 0.5, "not measured"
    assert acceptance.estimate(0.5, 12) > 0.9
    assert acceptance.estimate(0.5, 2) < 0.1


def test_one_accepted_sibling_means_that_a_draft_can_continue() -> None:
    acceptance = AcceptanceModel()
    for _ in range(200):
        for accepted in (0, 1):
            acceptance.update(
                DraftOutcome(DraftSource.SPECULATOR, greedy=True, siblings=((0.6, 0), (0.15, 0)), accepted=accepted)
            )
    assert acceptance.estimate_next() > 0.9
    assert acceptance.estimate(0.6) == pytest.approx(0.5, abs=0.1)
    assert acceptance.estimate(0.15) == pytest.approx(0.5, abs=0.1)


def test_drafts_of_the_speculator_are_measured_by_the_confidence_of_the_suffix_draft() -> None:
    model = SpeculatorModel(3)
    for _ in range(300):
        model.update(reached(confidence=0.9, suffix_tokens=2, speculator_tokens=1, drafted_depth=3), 1.0)
        model.update(reached(confidence=0.0, suffix_tokens=0, speculator_tokens=2, drafted_depth=3), 1.0)
    confident, alone, unmeasured = (model.estimate(confidence) for confidence in (0.9, 0.0, 0.6))
    assert confident.reached == pytest.approx([1, 0, 0], abs=0.1)
    assert confident.exceeded == pytest.approx(1, abs=0.1)
    assert alone.reached == pytest.approx([1, 1, 0], abs=0.1)
    assert unmeasured.reached == alone.reached
    assert unmeasured.exceeded == pytest.approx(1 - alone.reached[0])


@given(
    st.lists(
        st.builds(
            SpeculatorOutcome,
            st.just(value=True),
            st.floats(0, 1),
            st.integers(0, 8),
            st.integers(0, MAX_DEPTH),
            st.integers(1, MAX_DEPTH),
        ),
        max_size=60,
    ),
    st.floats(0, 1),
)
def test_a_deeper_draft_is_never_likelier_to_be_accepted(outcomes: list[SpeculatorOutcome], confidence: float) -> None:
    model = SpeculatorModel(MAX_DEPTH)
    for one in outcomes:
        model.update(one, 1.0)
    estimate = model.estimate(confidence)
    assert all(0 <= rate <= 1 for rate in (*estimate.reached, estimate.exceeded))
    assert list(estimate.reached) == sorted(estimate.reached, reverse=True)


def test_a_slower_machine_changes_the_throughput_but_not_the_depth() -> None:
    planner = Planner(latency(), MAX_DEPTH)
    simulation = Simulation(planner, latency(), sequences=4)
    simulation.run(400, 0.8)
    before = simulation.depths[-1]
    truth = latency(row_ms=4.0, base_ms=80.0, first_ms=8.0, further_ms=4.0)
    simulation.truth = truth
    simulation.run(400, 0.8)
    assert abs(simulation.depths[-1] - before) <= 1
    assert planner.throughput[0] == pytest.approx(4 / truth.predict_verify(4, 4), rel=0.1)


@given(
    knots=st.dictionaries(st.integers(1, 64), st.floats(1e-3, 1.0), min_size=1, max_size=6),
    errors=st.lists(st.tuples(st.integers(1, 80), st.floats(-2, 2)), max_size=40),
)
def test_a_latency_curve_stays_positive_at_its_knots(knots: dict[int, float], errors: list[tuple[int, float]]) -> None:
    curve = LatencyCurve(knots)
    for rows, error in errors:
        curve.update(rows, error)
    assert all(curve.predict(rows) > 0 for rows in knots)


def test_a_latency_curve_learns_between_its_knots() -> None:
    curve = LatencyCurve({1: 1.0, 8: 1.0, 32: 1.0})
    for _ in range(200):
        for rows in (1, 4, 8):
            curve.update(rows, 0.2 * (0.1 * rows - curve.predict(rows)))
    assert curve.predict(4) == pytest.approx(0.4, rel=0.05)
    assert curve.predict(32) == pytest.approx(1.0, rel=0.05)


def test_latency_separates_the_cost_of_rows_from_that_of_sequences() -> None:
    """Rows of one sequence take 1 ms; every further sequence takes 3 ms more."""
    model = LatencyModel(
        LatencyCurve({1: 0.01, 33: 0.01}), LatencyCurve({1: 0.0, 8: 0.0}), *[LatencyCurve({1: 1.0})] * 2
    )
    draws = random.Random(0)
    for _ in range(6000):
        sequences, rows = draws.choice(((1, 5), (1, 16), (8, 8), (8, 20)))
        seconds = 0.01 + 0.001 * rows + 0.003 * (sequences - 1)
        model.update_verify(ForwardTiming(sequences, rows, seconds))
    one, many = model.predict_verify(1, 16) * model.pace, model.predict_verify(8, 16) * model.pace
    assert many - one == pytest.approx(0.021, rel=0.25)
