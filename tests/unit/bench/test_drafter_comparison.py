"""The comparison of the drafters on a tiny target: its figures, its goals, and what the corpus may hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

import pytest
from tiny_target import VOCABULARY, write_tiny_target

from ops.bench import prompts, speculator
from ops.bench.engines import DriveResult, EnginePool
from ops.bench.harness import Figure
from ops.bench.serving.drafter_comparison import (
    ComparisonPlan,
    DrafterComparison,
    day_0_names,
    figure_names,
    list_cases,
)
from schemas.settings import load
from schemas.speculator import checkpoint
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine

PLAN = ComparisonPlan(
    trials=2,
    tokens=5,
    repetitive_tokens=9,
    prompts=2,
    batches=(1, 4),
    kinds=("greedy", "sampled"),
    warm_up=3,
    day_0_tokens=4,
)


class HashTokenizer:
    """Six tokens for each text, which depend on the whole text."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> list[int]:
        text = messages[0]["content"]
        return [1 + crc32(f"{i}{text}".encode()) % (VOCABULARY - 1) for i in range(6)]


class RecordingPool(EnginePool):
    """Keeps the requests that ran."""

    ran: list[Request]

    def run(self, engine: BuiltinEngine, requests: Sequence[Request], concurrency: int) -> DriveResult:
        self.ran.extend(requests)
        return super().run(engine, requests, concurrency)


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingPool]:
    monkeypatch.setattr(prompts, "load_tokenizer", lambda _: HashTokenizer())
    flags = {
        "target.path": str(write_tiny_target(tmp_path / "target")),
        "speculator.draft_vocab_size": VOCABULARY,
        "stack.data_dir": str(tmp_path),
        "serve.max_model_len": 64,
        "serve.max_num_seqs": 4,
        "serve.weight_dtype": "float32",
    }
    created = RecordingPool(load(environ={}, flags=flags), "math", "math", PLAN.tokens, lambda _: None)
    created.ran = []
    cache_draft(created, "math")
    yield created
    created.stop()


def cache_draft(pool: EnginePool, name: str) -> None:
    target = speculator.read_target(pool.settings)
    checkpoint.write_checkpoint(target.day_0, speculator.cache_folder(pool.settings, name), target.fingerprint)


def measure(pool: EnginePool, *prefixes: str, plan: ComparisonPlan = PLAN) -> dict[str, Figure]:
    figures = DrafterComparison(pool, plan, lambda name: name.startswith(prefixes)).measure()
    return {figure.name: figure for figure in figures}


def test_every_domain_batch_size_and_temperature_has_its_figures_once() -> None:
    names = figure_names(PLAN)
    assert len(set(names)) == len(names) == 6 * 2 * 2 * 3 + 2 * 2 * 2 + 2 + 2
    assert {"hybrid_over_eagle_b4_edits", "hybrid_over_none_b1_chat_sampled", "nothing_matches_penalty"} <= set(names)
    assert {"hybrid_over_best_single_b1_math_foreign", "day0_first_100_requests_b4"} <= set(names)


def test_goals_follow_batch_size_and_domain() -> None:
    goals = {name: str(goal) for case in list_cases(PLAN) for name, goal in case.goals.items() if goal}
    assert goals["hybrid_over_eagle_b1_tools"] == goals["hybrid_over_eagle_b4_sql_sampled"] == ">= 1.15"
    assert goals["hybrid_over_eagle_b4_chat"] == ">= 0.98"
    assert goals["hybrid_over_none_b4_math"] == ">= 1.45"
    assert not {"hybrid_over_none_b1_math", "hybrid_over_none_b4_sql", "hybrid_over_eagle_b1_math"} & set(goals)
    assert {goal for name, goal in goals.items() if "best_single" in name} == {">= 0.98"}


def test_all_arms_of_a_case_are_measured(pool: RecordingPool) -> None:
    figures = measure(pool, "hybrid_over_eagle_b1_sql", "hybrid_over_best_single_b1_sql")
    assert list(figures) == [
        "hybrid_over_eagle_b1_sql",
        "hybrid_over_best_single_b1_sql",
        "hybrid_over_eagle_b1_sql_sampled",
        "hybrid_over_best_single_b1_sql_sampled",
    ]
    detail = figures["hybrid_over_best_single_b1_sql"].detail
    rates = detail["tokens_per_s"]
    assert set(rates) == {"none", "suffix", "eagle", "hybrid"}
    assert detail["under"] == max(("suffix", "eagle"), key=rates.get)
    assert detail["speculator"] == "math"
    assert detail["accepted_per_step"]["none"] == 0


def test_no_answer_to_a_measured_prompt_enters_the_corpus(pool: RecordingPool) -> None:
    measure(pool, "hybrid_over_eagle_b4_sql")
    held_out = set(pool.held_out_prompts("sql"))
    traced = [request for request in pool.ran if request.trace]
    assert len(traced) == 2 * 3 * PLAN.warm_up
    assert not held_out & {request.prompt for request in traced}
    assert all(request.prompt in held_out for request in pool.ran if not request.trace)


def test_answers_that_repeat_their_prompts_may_be_longer(pool: RecordingPool) -> None:
    measure(pool, "hybrid_over_none_b1_edits", "hybrid_over_none_b1_sql")
    assert {(request.label, request.max_tokens) for request in pool.ran} == {("edits", 9), ("sql", 5)}


def test_no_prompt_warms_a_drafter_up_twice(pool: RecordingPool) -> None:
    cache_draft(pool, "code")
    measure(pool, "hybrid_over_best_single_b1_math")
    warming = [request.prompt for request in pool.ran if request.trace]
    assert len(warming) == 4 * 3 * PLAN.warm_up
    assert len(set(warming)) == 4 * PLAN.warm_up


def test_a_case_without_its_draft_names_the_command_that_trains_one(pool: RecordingPool) -> None:
    pool.name = "mine"
    (figure,) = measure(pool, "hybrid_over_eagle_b1_chat_sampled").values()
    assert figure.value is None
    assert "`aurora bench speculator` trains one" in figure.detail["why"]


def test_a_foreign_draft_is_that_of_another_domain(pool: RecordingPool) -> None:
    cache_draft(pool, "code")
    figures = measure(pool, "hybrid_over_best_single_b4_math")
    drafts = {name: figure.detail["speculator"] for name, figure in figures.items()}
    assert drafts["hybrid_over_best_single_b4_math"] == "math"
    assert drafts["hybrid_over_best_single_b4_math_foreign"] == "code"


def test_the_first_requests_are_of_all_domains_and_no_prompt_is_sent_twice(pool: RecordingPool) -> None:
    figures = measure(pool, "day0")
    assert list(figures) == list(day_0_names(PLAN).values())
    for arm in (True, False):
        sent = [(request.label, request.prompt) for request in pool.ran if request.label and request.trace is arm]
        assert len(sent) == 2 * 100
        assert len(set(sent)) == 100
        assert {label for label, _ in sent} == set(prompts.ALL_DOMAINS)
    assert all(request.speculate is request.trace for request in pool.ran)


def test_the_penalty_of_a_drafter_without_matches_is_measured_on_random_prompts(pool: RecordingPool) -> None:
    figures = measure(pool, "nothing_matches_penalty_b4")
    assert str(figures["nothing_matches_penalty_b4"].goal) == "<= 1.02"
    assert {request.label for request in pool.ran} == {"random"}
    assert not any(request.trace for request in pool.ran)
