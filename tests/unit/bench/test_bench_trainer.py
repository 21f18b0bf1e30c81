"""The training data of the trainer benchmark, its workers, and the figures of its trials."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_draft import SHAPE

from ops.bench.trainer import peer_worker, synthetic_data
from ops.bench.trainer.our_worker import AuroraTrainer
from ops.bench.trainer.peer_worker import TYPES, StepsCost, StepWorker
from ops.bench.trainer.trainer_benchmark import (
    FULL,
    QUICK,
    TREE_TTT_STEPS,
    TrainerCase,
    TrainerSize,
    figure_names,
    judge,
)
from schemas.draft_tree import depths
from schemas.settings import Train
from schemas.speculator.network import random_draft
from trainer.data.batch import collate
from trainer.data.samples import Sample
from trainer.objective.losses import ttt_loss

LAYOUT = synthetic_data.TreeRequest(prompt=8, output=16, every=4)
WIDE = replace(SHAPE, vocab_size=512, draft_vocab_size=256)
PLAN = replace(QUICK, lengths=(8,), tokens=16, steps=1)
CASE = TrainerCase(8, 3)


def took(*seconds: float) -> list[StepsCost]:
    return [StepsCost(value, 2 * value, 1.0, 3 << 20, "a batch") for value in seconds]


def test_a_ratio_is_over_the_peer_that_was_fastest_in_that_case() -> None:
    trials = {CASE: {"ours": took(1, 2, 2), "speculators": took(2, 3, 8), "specforge": took(9, 9, 9)}}
    figures = {figure.name: figure for figure in judge(PLAN, trials, {})}
    compared = figures["ratio_to_best_peer_t8_k3"]
    assert (compared.value, compared.met) == (2, True)
    assert (compared.detail or {})["best_peer"] == "speculators"
    assert figures["ratio_to_best_peer"].value == 2
    assert figures["tokens_per_s_t8_k3"].value == 8
    assert figures["peak_memory_t8_k3"].value == 3


def test_without_a_peer_the_ratio_has_a_reason() -> None:
    figures = {figure.name: figure for figure in judge(PLAN, {CASE: {"ours": took(1)}}, {"speculators": "not built"})}
    summary = figures["ratio_to_best_peer"].summary()
    assert (summary["value"], summary["met"], summary["why"]) == (None, None, "speculators: not built")
    assert figures["tokens_per_s_t8_k3"].value == 16


def test_every_measured_figure_is_in_the_list_of_names() -> None:
    trials = {case: {"ours": took(1), "speculators": took(1)} for case in QUICK.cases}
    measured = [figure.name for figure in judge(QUICK, trials, {})]
    assert [*measured, "tree_vs_branch", "tree_vs_chains"] == figure_names(QUICK)


@pytest.mark.parametrize("size", [QUICK, FULL])
def test_every_case_has_the_same_number_of_tokens_per_step(size: TrainerSize) -> None:
    assert all(size.tokens % length == 0 for length in size.lengths)


def test_the_training_time_test_reaches_all_sixteen_nodes_of_the_tree() -> None:
    assert len(synthetic_data.TREE) == 16
    assert max(depths(synthetic_data.TREE)) < TREE_TTT_STEPS


def rejected(samples: list[Sample], **changed: float) -> tuple[float, int]:
    train = Train(ttt_steps=TREE_TTT_STEPS, rejected_weight=1.0, **changed)  # type: ignore[arg-type]
    draft = random_draft(WIDE, 0)
    loss = ttt_loss(draft, synthetic_data.random_embeddings(WIDE, 0), collate(samples), train)
    return loss.rejected, loss.nodes


def test_chains_and_single_branches_train_on_the_same_number_of_nodes() -> None:
    whole = synthetic_data.build_tree_sample(WIDE, LAYOUT, 0)
    shared = collate([whole]).drafted
    chains = collate([synthetic_data.separate_chains(whole, WIDE)]).drafted
    single = collate(synthetic_data.split_branches(whole)).drafted
    length = sum(len(branch.tokens) for branch in whole.branches)
    assert len(shared) < len(single) == len(chains) == length
    assert len(shared) <= len(synthetic_data.TREE) * len(LAYOUT.roots)


def test_a_split_branch_has_the_same_loss_as_in_its_sample() -> None:
    whole = synthetic_data.build_tree_sample(WIDE, LAYOUT, 0)
    alone = replace(whole, branches=whole.branches[-1:])
    request, copy = synthetic_data.split_branches(alone)
    assert not request.branches
    assert rejected([copy]) == pytest.approx(rejected([alone]), rel=1e-4)


def test_a_worker_warms_up_and_steps_on_request(tmp_path: Path) -> None:
    synthetic_data.write_data(tmp_path, WIDE, [16], 32, seed=0)
    asked = [{"case": "16.pt", "ttt_steps": 3, "number": number} for number in (0, 2)]
    answers = io.StringIO()
    start = partial(StepWorker, AuroraTrainer, tmp_path, ["bfloat16"])
    peer_worker.serve_requests(start, "aurora-stream", [json.dumps(request) for request in asked], answers)
    about, warm, done = map(json.loads, answers.getvalue().splitlines())
    assert about["torch"] == torch.__version__
    assert done["way"] == warm["way"] == "bfloat16"
    assert done["loss"] < warm["loss"]
    assert done["seconds"] > 0


def test_a_missing_trainer_reports_why_it_is_absent(tmp_path: Path) -> None:
    class Missing(AuroraTrainer):
        modules = ("no_such_trainer",)

    answers = io.StringIO()
    peer_worker.serve_requests(partial(StepWorker, Missing, tmp_path, TYPES), "aurora-stream", [], answers)
    assert "no_such_trainer" in json.loads(answers.getvalue())["absent"]
