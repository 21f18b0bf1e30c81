"""Learning from recorded traffic: the recording, the trials, their figures, and the study."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from chat_target import write_chat_target
from tiny_target import VOCABULARY, write_tiny_target
from typer.testing import CliRunner

from ops.bench import prompts, recording
from ops.bench.learning import day_0, learning_figures, recorded_traffic, study, trials, variants
from ops.bench.learning.learning_figures import mean_interval, paired_interval
from ops.bench.learning.learning_page import (
    base_chart,
    render_learning_page,
    shifts_chart,
    state_verdict,
    variants_chart,
)
from ops.bench.learning.recorded_traffic import RecordedTraffic
from ops.bench.learning.trials import TrialResult, order_stream
from ops.bench.learning.variants import BASE, PLAN, LearningTrial, Variant
from ops.cli.main import app
from ops.replay.suffix_replay import NodeSuffixReplay
from ops.report.charts import spread_labels
from schemas.errors import UserError
from schemas.settings import Settings, load
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.batch import collate
from trainer.data.samples import Branch, Sample, Teacher
from trainer.data.target import read_target
from trainer.objective.simulated_acceptance import simulate_acceptance
from trainer.replay.learning_curve import learning_curve, tokens_to_level
from trainer.replay.named_drafts import NamedDraft
from trainer.replay.prequential import BatchScore, PrequentialRun, cut_branches, simulate_positions
from trainer.replay.request_evaluation import evaluate, list_drafters

TINY = Variant(
    "base",
    "the base",
    (
        ("train.ttt_steps", 2),
        ("train.learning_rate", 5e-3),
        ("train.batch_size", 8),
        ("train.replay_batch_size", 4),
    ),
    orders=("mixed", "ordered"),
)
PER_DOMAIN = 6


def requests() -> list[list[Request]]:
    generator = torch.Generator().manual_seed(3)
    prompt = lambda: tuple(torch.randint(2, VOCABULARY, (6,), generator=generator).tolist())  # noqa: E731
    by_domain = [
        [Request(f"{domain}-{i:05}", prompt(), 14, label=domain, ignore_eos=True) for i in range(PER_DOMAIN)]
        for domain in prompts.DOMAINS
    ]
    return recorded_traffic.split_segments(by_domain)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """With recorded traffic of a tiny target."""
    folder = tmp_path_factory.mktemp("learning")
    flags = {
        "target.path": str(write_tiny_target(folder / "target")),
        "speculator.draft_vocab_size": VOCABULARY,
        "stack.data_dir": str(folder),
        "serve.max_model_len": 64,
        "serve.weight_dtype": "float32",
        "serve.adaptive_drafting": False,
        "serve.num_speculative_tokens": 5,
        "serve.max_waiting_requests": 64,
    }
    made = load(environ={}, flags=flags)
    recorder = recording.Recorder()
    engine = BuiltinEngine(made, recorder)
    engine.start()
    served = list(recorded_traffic.SegmentRecording(made, engine, recorder).run(requests()))
    again = list(recorded_traffic.SegmentRecording(made, engine, recorder).run(requests()))
    engine.stop()
    assert [s.output_tokens for s in served] == [4 * PER_DOMAIN * 14]
    assert not again, "what is recorded is not served again"
    return made


@pytest.fixture(scope="module")
def recorded(settings: Settings) -> RecordedTraffic:
    return recorded_traffic.read_traffic(settings)


def run(
    settings: Settings, recorded: RecordedTraffic, variant: Variant = TINY, order: str = "mixed", seed: int = 0
) -> TrialResult:
    return trials.run_trial(settings, recorded, LearningTrial(variant, order, seed))  # type: ignore[arg-type]


# Recording


def test_a_shorter_recording_is_the_prefix_of_a_longer_one() -> None:
    made = [[Request(f"{d}-{i}", (1,), 1) for i in range(45)] for d in prompts.DOMAINS]
    longer = recorded_traffic.split_segments(made)
    assert recorded_traffic.split_segments([domain[:30] for domain in made]) == longer[:2]
    for segment in longer:
        assert sorted(r.id.partition("-")[0] for r in segment) == sorted(list(prompts.DOMAINS) * 15)
    assert [r.id for r in longer[0]] != sorted(r.id for r in longer[0])


def test_recorded_traffic_is_read_in_the_order_in_which_it_was_sent(
    settings: Settings, recorded: RecordedTraffic
) -> None:
    assert [asked.request for asked in recorded.requests] == [r.id for segment in requests() for r in segment]
    assert all(asked.label == asked.request.partition("-")[0] for asked in recorded.requests)
    assert all((asked.committed, asked.output_tokens) == (20, 14) for asked in recorded.requests)
    assert any(asked.branches for asked in recorded.requests)
    first = recorded_traffic.read_traffic(settings, tokens=50)
    assert [asked.request for asked in first.requests] == [asked.request for asked in recorded.requests[:3]]
    assert first.digest != recorded.digest


def test_recorded_traffic_is_not_served_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_traffic, "plan_segments", lambda *_: requests())
    said: list[str] = []
    recorded_traffic.record_traffic(settings, PER_DOMAIN, said.append)
    assert said == [f"{4 * PER_DOMAIN} requests are recorded in {recorded_traffic.traffic_folder(settings)} already"]


def test_missing_traffic_names_the_flag_that_records_it(settings: Settings, tmp_path: Path) -> None:
    elsewhere = settings.model_copy(update={"stack": settings.stack.model_copy(update={"data_dir": str(tmp_path)})})
    with pytest.raises(UserError, match=r"aurora bench learning --record"):
        recorded_traffic.read_traffic(elsewhere)


@pytest.fixture(scope="module")
def sampled(settings: Settings) -> RecordedTraffic:
    """Recorded requests that were sampled and drafted with trees."""
    kind = recorded_traffic.SAMPLED
    drafting = {"num_speculative_tokens": kind.depth, "draft_tree_width": kind.tree_width}
    segments = [[replace(one, temperature=kind.temperature, seed=3) for one in segment] for segment in requests()]
    with recording.recording_engine(settings, 64, **drafting) as (engine, recorder):
        list(recorded_traffic.SegmentRecording(settings, engine, recorder, kind).run(segments))
    return recorded_traffic.read_traffic(settings, kind=kind)


def test_a_sampled_recording_holds_sampled_requests_with_the_branches_of_trees(
    recorded: RecordedTraffic, sampled: RecordedTraffic
) -> None:
    assert all(one.sampling is not None and one.sampling.greedy for one in recorded.requests)
    assert all(
        one.sampling is not None and one.sampling.temperature == pytest.approx(prompts.SAMPLED)
        for one in sampled.requests
    )
    assert sampled.digest != recorded.digest

    def most_siblings(traffic: RecordedTraffic) -> int:
        firsts: dict[tuple[str, int], set[int]] = {}
        for one in traffic.requests:
            for branch in one.branches:
                firsts.setdefault((one.request, branch.root), set()).add(branch.tokens[0])
        return max(map(len, firsts.values()))

    assert most_siblings(sampled) > most_siblings(recorded)


def test_sampled_requests_are_walked_by_their_probabilities(settings: Settings, sampled: RecordedTraffic) -> None:
    made = variants.trial_settings(settings, LearningTrial(TINY, "recorded", 0))
    target = read_target(made)
    learning = PrequentialRun(target.new_draft(), target.embeddings_VH, made.train, seed=0, lookahead=3)
    for _ in range(4):
        learning.train(sampled.requests)
    (one,) = whole = [replace(sampled.requests[0], branches=())]
    walked = simulate_acceptance(learning.export_draft(), target.embeddings_VH, whole, 3)
    assert walked.verify_steps % 1, "the number of verify steps is an expectation"
    learning.train(whole, [NodeSuffixReplay(made).accept(trials.as_past_request(one, 0))])
    scores = learning.state().scores[-1].drafters
    assert scores is not None
    assert scores.eagle.verify_steps == pytest.approx(walked.verify_steps)
    assert scores.hybrid.verify_steps <= min(scores.eagle.verify_steps, scores.suffix.verify_steps)


# Streams


@pytest.mark.parametrize("seed", [0, 3])
def test_the_seed_selects_the_first_domain_of_an_ordered_stream(recorded: RecordedTraffic, seed: int) -> None:
    stream = order_stream(recorded, "ordered", seed)
    begun = list(dict.fromkeys(asked.label for asked in stream))
    assert begun == [*prompts.DOMAINS[seed:], *prompts.DOMAINS[:seed]]
    assert [asked.label for asked in stream] == [domain for domain in begun for _ in range(PER_DOMAIN)]


def test_both_orders_hold_the_same_requests_and_the_seed_shuffles_them(recorded: RecordedTraffic) -> None:
    streams = [
        [a.request for a in order_stream(recorded, order, seed)] for order in ("mixed", "ordered") for seed in (0, 1)
    ]
    assert len({tuple(stream) for stream in streams}) == 4
    assert len({tuple(sorted(stream)) for stream in streams}) == 1


def test_the_recorded_order_is_that_of_the_recording_for_every_seed(recorded: RecordedTraffic) -> None:
    assert order_stream(recorded, "recorded", 0) == order_stream(recorded, "recorded", 1) == [*recorded.requests]


# Runs


def test_every_batch_is_scored_before_it_is_trained_on(settings: Settings, recorded: RecordedTraffic) -> None:
    result = run(settings, recorded)
    target = read_target(variants.trial_settings(settings, LearningTrial(TINY, "mixed", 0)))
    first = order_stream(recorded, "mixed", 0)[:4]
    untrained = simulate_positions(target.new_draft(), target.embeddings_VH, collate(first), 4)
    scored = result.scores[: len({asked.label for asked in first})]
    assert (sum(p.accepted for p in scored), sum(p.positions for p in scored)) == untrained


def test_the_drafters_have_the_verify_steps_of_an_evaluation(settings: Settings, recorded: RecordedTraffic) -> None:
    made = variants.trial_settings(settings, LearningTrial(TINY, "mixed", 0))
    target = read_target(made)
    learning = PrequentialRun(target.new_draft(), target.embeddings_VH, made.train, seed=0, lookahead=4)
    for _ in range(12):
        learning.train(recorded.requests)
    past = [trials.as_past_request(sample, i) for i, sample in enumerate(recorded.requests)]
    drafters = list_drafters(["eagle", "suffix", "hybrid"], [NamedDraft("trained", "1", learning.export_draft())])
    evaluation = evaluate(drafters, target.embeddings_VH, past, 4, {}, Counter(), suffix=NodeSuffixReplay(made))
    steps = zip(*(request.steps for request in evaluation.requests), strict=True)
    expected = [(sum(s.verify_steps for s in each), sum(s.accepted for s in each)) for each in steps]

    replay = NodeSuffixReplay(made)
    learning.train([replace(s, label=None) for s in recorded.requests], [replay.accept(one) for one in past])
    assert learning.state().scores[-1].drafters == tuple(expected)
    eagle, suffix, hybrid = expected
    assert hybrid[0] < min(eagle[0], suffix[0]), "each drafter is right where the other is not"


def test_a_trial_trains_on_all_traffic_once_and_replays_as_much(settings: Settings, recorded: RecordedTraffic) -> None:
    result = run(settings, recorded)
    assert sum(point.tokens for point in result.scores) == recorded.tokens
    assert sum(point.output_tokens for point in result.scores) == 4 * PER_DOMAIN * 14
    assert len(result.losses) == PER_DOMAIN
    assert result.losses[-1] < result.losses[0]
    assert result.trained_tokens == (2 * 4 * PER_DOMAIN - 4) * 19, "in the first step there is nothing to replay"


def test_a_trial_depends_on_its_seed(settings: Settings, recorded: RecordedTraffic) -> None:
    one, again, other = (run(settings, recorded, seed=seed) for seed in (0, 0, 1))
    assert (one.scores, one.losses) == (again.scores, again.losses)
    assert one.losses[0] != other.losses[0]


def test_an_ordered_run_scores_a_draft_that_was_frozen_when_the_first_domain_ended(
    settings: Settings, recorded: RecordedTraffic
) -> None:
    result = run(settings, recorded, order="ordered")
    is_scored = [point.static_accepted is not None for point in result.scores]
    shifted = next(i for i, point in enumerate(result.scores) if point.label != result.scores[0].label)
    assert is_scored == [i >= shifted - 1 for i in range(len(is_scored))], "the batch that holds both domains, and on"
    both = [point for point in result.scores[: shifted + 1] if point.static_accepted is not None]
    assert all(point.accepted == point.static_accepted for point in both), "it is the draft of that moment"


def sample_of(tokens: int, branches: tuple[Branch, ...] = ()) -> Sample:
    known = torch.arange(tokens) >= 2
    teacher = Teacher(torch.zeros(int(known.sum()), 1, dtype=torch.int64), torch.zeros(int(known.sum()), 1))
    return Sample("r", torch.arange(tokens), None, torch.zeros(tokens, 4), known, teacher, branches)


def branch(tokens: tuple[int, ...], accepted_prefix: int) -> Branch:
    teacher = Teacher(torch.arange(len(tokens))[:, None], torch.zeros(len(tokens), 1))
    return Branch(3, tokens, accepted_prefix, tuple(-0.1 * i for i in range(len(tokens))), teacher)


def test_branches_are_cut_as_if_fewer_tokens_had_been_drafted() -> None:
    early, late = branch((7, 8, 9, 10), accepted_prefix=1), branch((4, 5, 6, 1), accepted_prefix=2)
    (kept,) = cut_branches(sample_of(9, (early, late)), nodes=2).branches
    assert (kept.root, kept.tokens, kept.accepted_prefix) == (3, (7, 8), 1)
    assert kept.draft_logprobs == (0.0, -0.1)
    assert kept.teacher.ids.tolist() == [[0], [1]], "the branch that was wrong later is one that was kept whole"


# Figures


def point(domain: str, accepted: int, static: int | None = None, tokens: int = 1000) -> BatchScore:
    return BatchScore(domain, tokens, 80, accepted, 100, static)


def test_a_curve_value_covers_the_last_tokens() -> None:
    points = [point("math", 0), point("code", 100), point("math", 50), point("code", 150)]
    assert learning_curve(points, window=2000) == [(1000, 0.0), (2000, 0.5), (3000, 0.75), (4000, 1.0)]
    assert learning_curve(points, window=3000, label="code") == [(2000, 1.0), (4000, 1.25)]
    assert tokens_to_level(learning_curve(points, window=2000), 0.7) == 3000
    assert tokens_to_level(learning_curve(points, window=2000), 1.1) is None
    assert learning_figures.level_at(learning_curve(points, window=2000), 3500) == 1.0
    assert learning_figures.level_at(learning_curve(points, window=2000), 4001) is None
    assert learning_figures.count_output_tokens(points, 3500) == 3 * 80


def test_a_curve_equals_the_sums_over_its_window() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(1, 900, (60, 3), generator=generator).tolist()
    points = [BatchScore("math" if a % 2 else "sql", t, 1, a, p, None) for t, a, p in draws]
    ends = list(accumulate(p.tokens for p in points))
    for domain in (None, "sql"):
        for value in learning_curve(points, 2500, domain):
            within = [
                p
                for end, p in zip(ends, points, strict=True)
                if value.tokens - 2500 < end <= value.tokens and domain in (None, p.label)
            ]
            assert value.accepted_per_step == sum(p.accepted for p in within) / sum(p.positions for p in within)


def test_a_shift_has_its_drop_its_recovery_and_the_ratio_to_the_frozen_draft() -> None:
    ended = [point("code", 40), *[point("code", 100)] * 6]
    begun = [point("math", accepted, static=20) for accepted in (10, 30, 60, 90, 110, 120, 120, 120, 120, 120)]
    (shift,) = learning_figures.find_shifts([*ended, *begun])
    assert shift.domain == "math"
    assert (shift.before, shift.after, shift.drop) == (1.0, 0.2, 0.8)
    assert shift.recovered_after == 5000, "of the last 2,000 tokens 100 in 100 were right, and 0.9 is enough"
    assert shift.settled_after == 6000, "0.9 of 1.18 at its own end"
    assert shift.over_static == pytest.approx((1000 + 900) / (1000 + 200))
    (never,) = learning_figures.find_shifts([*ended, *begun[:3]])
    assert never.recovered_after is None


def test_the_curve_of_the_frozen_draft_begins_where_it_was_frozen() -> None:
    points = [point("code", 100), point("math", 50, static=20), point("math", 60, static=40)]
    assert learning_figures.static_curve(points, window=2000) == [(2000, 0.2), (3000, pytest.approx(0.3))]
    assert learning_figures.static_curve(points[:1]) == []


def test_intervals_are_students_and_pairs_remove_the_variation_of_seeds() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 2.484, 2 + 2.484), abs=1e-3)
    assert mean_interval([1.0])[1:] == (None, None)
    assert not mean_interval([0.5]).is_clear
    assert not paired_interval([1.0, 5.0, 9.0], [1.1, 4.8, 9.1]).is_clear
    assert paired_interval([1.0, 5.0, 9.0], [0.9, 4.8, 8.85]).is_clear


def test_seeds_that_never_reach_a_level_count_as_infinite() -> None:
    assert learning_figures.median_reached([30, None, 10]) == 30
    assert learning_figures.median_reached([30, None, None]) is None


def test_overlapping_labels_are_spread() -> None:
    assert spread_labels([0.5, 0.1, 0.52], 0.1) == [0.5, 0.1, pytest.approx(0.6)]


# Variants


def test_every_variant_changes_existing_settings(settings: Settings) -> None:
    names = [variant.name for variant in PLAN]
    assert len(set(names)) == len(names)
    assert set(variants.QUICK_VARIANTS) <= set(names)
    for variant in PLAN:
        assert variant.against in names
        assert variants.trial_settings(load(environ={}), LearningTrial(variant, "mixed", 2)).train.seed == 2


def test_a_variant_overrides_the_users_settings_which_override_the_base() -> None:
    own = load(environ={}, flags={"train.max_grad_norm": 0.5, "train.learning_rate": 3e-4, "train.poll_interval": 9})
    values = variants.variant_values(own, Variant("fast", "rate", (("train.learning_rate", 2e-3),)))
    assert values == {**BASE, "train.max_grad_norm": 0.5, "train.learning_rate": 2e-3}


def test_a_selection_includes_the_compared_variants() -> None:
    assert [v.name for v in variants.select_variants(["lookahead-3-both"])] == [
        "base",
        "lookahead-3-accepted",
        "lookahead-3-both",
    ]
    with pytest.raises(UserError, match="--only speed: no such variant; there are base, "):
        variants.select_variants(["speed"])


# The whole study


@pytest.fixture(scope="module")
def small(settings: Settings) -> study.Study:
    plan = (
        TINY,
        replace(TINY, name="lambda-0", question="weight", changes=(*TINY.changes, ("train.rejected_weight", 0.0))),
    )
    original, variants.PLAN = variants.PLAN, plan  # type: ignore[misc, assignment]
    try:
        return study.run(settings, lambda _line: None, seeds=2)
    finally:
        variants.PLAN = original  # type: ignore[misc]


def test_a_trial_with_a_result_is_not_run_again(settings: Settings, recorded: RecordedTraffic, tmp_path: Path) -> None:
    elsewhere = tmp_path / "bench" / "recorded"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to(recorded_traffic.traffic_folder(settings).parent)
    own = settings.model_copy(update={"stack": settings.stack.model_copy(update={"data_dir": str(tmp_path)})})
    planned = [LearningTrial(TINY, "mixed", 0), LearningTrial(replace(TINY, name="the-same"), "mixed", 0)]
    _, first = trials.run_trials(own, planned, None, 1, lambda _line: None)
    (file,) = trials.results_folder(own).glob("*.json")
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "training_s": 77.0}))
    said: list[str] = []
    _, second = trials.run_trials(own, planned, None, 1, said.append)
    assert [second[trial].training_s for trial in planned] == [77.0, 77.0]
    assert second[planned[0]].scores == first[planned[0]].scores
    assert said == [f"24 requests, {recorded.tokens} tokens of traffic; 0 of 2 trials are new"]


def test_the_file_of_a_result_depends_on_everything_but_the_code(settings: Settings) -> None:
    trial = LearningTrial(TINY, "mixed", 0)
    others = [
        trial,
        replace(trial, seed=1),
        replace(trial, order="ordered"),
        replace(trial, variant=replace(TINY, lookahead=3)),
        replace(trial, variant=replace(TINY, branch_nodes=3)),
        replace(trial, variant=replace(TINY, changes=(("speculator.init", "head"),))),
        replace(trial, variant=replace(TINY, changes=(("train.max_grad_norm", 0.5),))),
    ]
    files = {trials.result_file(settings, other, "digest") for other in others} | {
        trials.result_file(settings, trial, "other")
    }
    assert len(files) == len(others) + 1


def test_the_report_contains_the_figures_of_the_base_and_every_variant(small: study.Study) -> None:
    summary = json.loads(json.dumps(small.report().summary()))
    assert {
        "tokens_to_accepted_per_step_0_5",
        "tokens_to_accepted_per_step_1_0",
        "tokens_to_accepted_per_step_1_5",
    } < set(summary["figures"])
    assert summary["figures"]["tokens_to_accepted_per_step_1_0"]["goal"] == "<= 80000"
    assert [(v["name"], v["order"]) for v in summary["variants"]] == [
        (name, order) for name in ("base", "lambda-0") for order in ("mixed", "ordered")
    ]
    other = summary["variants"][2]
    assert other["against"] == "base"
    assert other["overall_difference"]["low"] <= other["overall_difference"]["high"]
    assert other["hybrid_difference"]["mean"] == pytest.approx(
        other["hybrid"]["mean"] - summary["variants"][0]["hybrid"]["mean"], abs=2e-4
    )
    assert other["seeds"] == 2


def test_a_study_of_sampled_traffic_runs_every_variant_in_recorded_order(
    settings: Settings, sampled: RecordedTraffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "PLAN", (TINY, replace(TINY, name="lambda-0", question="weight")))
    found = study.run(settings, lambda _line: None, seeds=1, sampled=True)
    assert found.traffic.digest == sampled.digest
    assert [(runs.variant.name, runs.order) for runs in found.runs] == [("base", "recorded"), ("lambda-0", "recorded")]
    assert (found.day_0, found.long_requests) == (None, None)
    assert "tokens of recorded traffic" in render_learning_page(found)


def test_the_page_is_self_contained_and_contains_every_variant(small: study.Study) -> None:
    html = render_learning_page(small)
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", html)
    assert "<script" not in html
    assert html.count("<svg") == 4
    assert html.count("<td>lambda-0</td>") == 2
    assert not re.findall(r"\{[{%]", html)


def test_a_chart_is_well_formed_and_uses_the_colors_of_the_page(small: study.Study) -> None:
    mixed, ordered = small.runs[0], small.runs[1]
    for svg in (base_chart(mixed), shifts_chart(ordered.seeds[0]), shifts_chart(None), variants_chart("q", [mixed])):
        assert ET.fromstring(svg).tag.endswith("svg")
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg.replace("#000000", ""))


def test_the_verdict_names_the_clear_differences() -> None:
    def of(name: str, *lengths: float) -> study.VariantRuns:
        seeds = [
            TrialResult(
                name=name,
                order="mixed",
                seed=i,
                scores=(point("math", round(100 * length)),),
                losses=(),
                trained_tokens=0,
                training_s=0,
                scoring_s=0,
            )
            for i, length in enumerate(lengths)
        ]
        return study.VariantRuns(Variant(name, "question"), "mixed", tuple(seeds))

    base = of("base", 0.5, 0.6, 0.7)
    better, worse, same = of("better", 0.6, 0.7, 0.81), of("worse", 0.3, 0.41, 0.5), of("same", 0.6, 0.5, 0.7)
    assert state_verdict([study.VariantComparison(r, base) for r in (better, worse, same)]) == (
        "Over the whole stream the acceptance length is clearly higher with better (+0.10, mixed). "
        "Over the whole stream the acceptance length is clearly lower with worse (-0.20, mixed). "
        "One comparison could be chance: its interval contains zero."
    )
    assert "One seed cannot separate" in state_verdict([study.VariantComparison(of("better", 0.6), of("base", 0.5))])


# The command


def test_missing_traffic_and_unknown_variants_are_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = write_tiny_target(tmp_path / "target")
    invoked = CliRunner().invoke(app, ["bench", "learning", "--set", f"target.path={target}"])
    assert invoked.exit_code == 2
    assert "no traffic is recorded" in invoked.stderr
    invoked = CliRunner().invoke(app, ["bench", "learning", "--only", "speed"])
    assert (invoked.exit_code, "no such variant" in invoked.stderr) == (2, True)


def test_the_command_writes_json_and_a_page(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variants, "PLAN", (TINY,))
    flags = {
        "target.path": settings.target.path,
        "stack.data_dir": settings.stack.data_dir,
        "speculator.draft_vocab_size": VOCABULARY,
    }
    sets = [part for name, value in flags.items() for part in ("--set", f"{name}={value}")]
    invoked = CliRunner().invoke(app, ["bench", "learning", "--seeds", "1", "--json", "--html", "page.html", *sets])
    assert invoked.exit_code == 0, invoked.output
    # Loggers that earlier tests used write to this process's standard output.
    report = json.loads(invoked.stdout[invoked.stdout.index("{\n") :])
    assert report["variants"][0]["name"] == "base"
    assert report["figures"]["long_requests_live_off_gate"]["tokens"][1] <= 256
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_committed_tokens_include_the_one_without_features() -> None:
    asked = replace(sample_of(tokens=5), next_token=3)
    assert (asked.committed, asked.output_tokens) == (6, 3)


# Before any traffic


@pytest.fixture(scope="module")
def writing(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """With a target that has a chat template, and eight seconds of processor time to learn in."""
    folder = tmp_path_factory.mktemp("day-0")
    target = settings.target.model_copy(update={"path": str(write_chat_target(folder / "target"))})
    train = settings.train.model_copy(update={"self_generation": 4.0})
    stack = settings.stack.model_copy(update={"data_dir": str(folder)})
    return settings.model_copy(update={"target": target, "train": train, "stack": stack})


def test_a_draft_learns_before_any_traffic_and_its_result_is_kept(writing: Settings, recorded: RecordedTraffic) -> None:
    lines: list[str] = []
    figure = day_0.measure_day_0(writing, recorded, lines.append)
    assert figure.name == "day0_accepted"
    assert figure.detail["accepted"].keys() == figure.detail["untrained"].keys() == set(prompts.DOMAINS)
    assert figure.value == pytest.approx(sum(figure.detail["accepted"].values()) / 4)
    assert figure.detail["accepted"] != figure.detail["untrained"]
    assert min(figure.detail[name] for name in ("samples", "steps", "trained_tokens")) > 0
    assert len(lines) == 1
    assert day_0.measure_day_0(writing, recorded, lines.append) == figure
    assert len(lines) == 1, "it is not measured twice"


def test_a_target_that_cannot_write_has_no_figure(settings: Settings, recorded: RecordedTraffic) -> None:
    figure = day_0.measure_day_0(settings, recorded, lambda _line: None)
    assert figure.value is None
    assert "self_generation_failed" in str(figure)


def test_each_domain_is_scored_on_its_own_requests(settings: Settings, recorded: RecordedTraffic) -> None:
    target = read_target(settings)
    found = day_0.simulate_domains(target.day_0, target.embeddings_VH, recorded.requests)
    for domain in prompts.DOMAINS:
        own = [replace(one, branches=()) for one in recorded.requests if one.label == domain]
        alone = simulate_acceptance(target.day_0, target.embeddings_VH, own, 3)
        assert found[domain] == pytest.approx(alone.accepted_per_step, abs=1e-4)
