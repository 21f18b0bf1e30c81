"""The run of ``aurora bench trainer``: the trainers as processes, their trials in turn, and draft trees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ops.bench.harness import (
    Figure,
    Goal,
    Rates,
    Report,
    Say,
    Selection,
    Session,
    TrialValues,
    compare_arms,
    in_turn,
    run_alternating,
    select_figures,
)
from ops.bench.trainer import peer_worker, synthetic_data
from ops.bench.trainer.peer_worker import TYPES, StepsCost
from ops.bench.trainer.synthetic_data import SMOLLM2, TREE, TreeRequest, case_file
from schemas.errors import UserError
from schemas.settings import Settings, Train
from schemas.speculator.network import random_draft
from trainer.data.batch import collate
from trainer.data.samples import Sample
from trainer.loop.learner import Learner, select_dtype

OURS = "ours"
PEERS = ("speculators", "specforge")
TREE_TTT_STEPS = 5
"""K for the trees, which are four deep: step 0 predicts their first tokens."""
_PEER_GOAL = Goal(1.5, at_least=True)
_BRANCH_GOAL = Goal(2.0, at_least=True)
_OVERALL = "ratio_to_best_peer"
_TREE_FIGURES = ("tree_vs_branch", "tree_vs_chains")
_MIB = 1 << 20
_SEED = 0
_STOP_TIMEOUT_S = 30.0

Costs = Mapping[str, Sequence[StepsCost]]
"""The costs of the trials of a case, by trainer."""


@dataclass(frozen=True, slots=True)
class TrainerCase:
    """One length of sequences and one length of the training-time test."""

    length: int
    ttt_steps: int

    def __str__(self) -> str:
        return f"t{self.length}_k{self.ttt_steps}"


@dataclass(frozen=True, slots=True)
class TrainerSize:
    """How much is measured."""

    lengths: tuple[int, ...]
    ttt_steps: tuple[int, ...]
    tokens: int
    """Of a training step, which has as many sequences."""
    steps: int
    """Of a trial."""
    trials: int
    tree_trials: int
    request: TreeRequest

    @property
    def cases(self) -> tuple[TrainerCase, ...]:
        """Every length with every number of TTT steps."""
        return tuple(TrainerCase(length, steps) for length, steps in product(self.lengths, self.ttt_steps))

    def rate(self, case: TrainerCase, costs: Sequence[StepsCost], by: str = "seconds") -> TrialValues:
        """Return the tokens per second of each trial."""
        tokens = self.tokens // case.length * case.length * self.steps
        return TrialValues(tuple(tokens / getattr(cost, by) for cost in costs))


QUICK = TrainerSize((128, 512), (3,), 512, steps=1, trials=3, tree_trials=3, request=TreeRequest(48, 32, 2))
FULL = TrainerSize((128, 512), (3, 5), 1024, steps=1, trials=6, tree_trials=6, request=TreeRequest(96, 64, 2))


def figure_names(size: TrainerSize) -> list[str]:
    """Return the names of all figures of a size."""
    of_case = (_OVERALL, "tokens_per_s", "peak_memory")
    return [_OVERALL, *(f"{name}_{case}" for case in size.cases for name in of_case), *_TREE_FIGURES]


def run(settings: Settings, say: Say, *, quick: bool, only: tuple[str, ...], peers: Path) -> Report:
    """Measure the figures whose names begin with one of ``only``, or all."""
    size, threads = QUICK if quick else FULL, settings.train.num_threads
    selected, session = select_figures(only, figure_names(size)), Session(threads)
    figures: list[Figure] = []
    trainers: dict[str, Any] = {}
    if any(selected(name) for name in figure_names(size) if name not in _TREE_FIGURES):
        with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder:
            synthetic_data.write_data(Path(folder), SMOLLM2, size.lengths, size.tokens, _SEED)
            figures, trainers = _compare_trainers(size, peers, Path(folder), settings.train, say)
    figures += _measure_trees(size, selected, threads)
    about = {"plan": asdict(size), "draft": asdict(SMOLLM2), "trainers": trainers, "seconds": session.seconds}
    title = f"trainer on {session.machine['processor']}, {threads} thread(s)"
    return session.report(title, about, (figure for figure in figures if selected(figure.name)))


class TrainerProcess:
    """A trainer in a process of its own; it is idle until steps are requested, so that trials can alternate."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        # Compiling takes a minute for each shape on a CPU, which would dominate a short comparison.
        environ = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "TORCHDYNAMO_DISABLE": "1"}
        self._name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environ},
        )
        self.about = self._read()
        """Versions of the trainer and of torch, or why it is ``absent``."""

    def run_steps(self, case: TrainerCase, number: int) -> StepsCost:
        """Run training steps; 0 steps select the fastest way for this case."""
        assert self._process.stdin is not None
        request = {"case": case_file(case.length), "ttt_steps": case.ttt_steps, "number": number}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return StepsCost(**self._read())

    def stop(self) -> None:
        """Stop the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self._name} failed with code {self._process.wait()}: run its worker to see why")
        response: dict[str, Any] = json.loads(line)
        return response


def _start_trainers(
    stack: ExitStack, environment: Path, data: Path, threads: int, types: Sequence[str]
) -> tuple[dict[str, TrainerProcess], dict[str, str]]:
    """Start this trainer and every installed peer; return also why the others are absent."""
    arguments = [str(data), str(threads), ",".join(types)]
    python = environment / "bin" / "python"
    commands = {OURS: [sys.executable, "-m", "ops.bench.trainer.our_worker", *arguments]}
    absent = {}
    for peer in PEERS:
        if python.exists():
            commands[peer] = [str(python), "-P", peer_worker.__file__, peer, *arguments]
        else:
            absent[peer] = f"no environment in {environment}; `make trainer-peers` builds it"
    processes = {}
    for name, command in commands.items():
        process = TrainerProcess(name, command, threads)
        stack.callback(process.stop)
        if "absent" in process.about:
            absent[name] = process.about["absent"]
        else:
            processes[name] = process
    return processes, absent


def _compare_trainers(
    size: TrainerSize, peers: Path, data: Path, train: Train, say: Say
) -> tuple[list[Figure], dict[str, Any]]:
    """Run all trainers in turn on the same sequences; return the figures and the versions of the trainers.

    Each trainer computes in the type of products that is fastest here, among the types that ``train.dtype`` allows.
    """
    with ExitStack() as stack:
        native = select_dtype(train.dtype, torch.device("cpu")) is torch.bfloat16
        types = [train.dtype] if train.dtype != "auto" else TYPES if native else TYPES[:1]
        trainers, absent = _start_trainers(stack, peers, data, train.num_threads, types)
        for name, why in absent.items():
            say(f"{name} is left out: {why}")
        measured: dict[TrainerCase, Costs] = {}
        losses: dict[str, float] = {}
        for case in size.cases:
            for name, trainer in trainers.items():
                losses.setdefault(name, trainer.run_steps(case, 0).loss)
            costs: dict[str, list[StepsCost]] = {name: [] for name in trainers}
            for trial in range(size.trials):
                for name in in_turn(trainers, trial):
                    costs[name].append(trainers[name].run_steps(case, size.steps))
            measured[case] = costs
            rates = {name: size.rate(case, cost).median for name, cost in costs.items()}
            say(f"{case}: " + ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items()))
        about = {name: {**trainer.about, "first_loss": round(losses[name], 4)} for name, trainer in trainers.items()}
    return judge(size, measured, absent), {**about, **{name: {"absent": why} for name, why in absent.items()}}


def judge(size: TrainerSize, measured: Mapping[TrainerCase, Costs], absent: Mapping[str, str]) -> list[Figure]:
    """Return the figures of all cases."""
    figures: list[Figure] = []
    ratios: list[float] = []
    by_processor: list[float] = []
    for case, costs in measured.items():
        compared = _compare_to_best_peer(size, case, costs, absent)
        if compared.ratios:
            ratios += compared.ratios.values
            by_processor.append(compared.detail["by_processor_time"])
        figures += [compared, _tokens_per_s(size, case, costs), _peak_memory(case, costs)]
    if not ratios:
        return [Figure(_OVERALL, None, goal=_PEER_GOAL, detail={"why": _join_reasons(absent)}), *figures]
    values = TrialValues(tuple(ratios))
    detail = {"by_processor_time": round(median(by_processor), 4)}
    return [Figure(_OVERALL, values.median, goal=_PEER_GOAL, ratios=values, detail=detail), *figures]


def _compare_to_best_peer(size: TrainerSize, case: TrainerCase, costs: Costs, absent: Mapping[str, str]) -> Figure:
    name = f"{_OVERALL}_{case}"
    rates = {
        trainer: Rates(size.rate(case, cost), size.rate(case, cost, by="processor")) for trainer, cost in costs.items()
    }
    peers = [peer for peer in PEERS if peer in rates]
    if not peers:
        return Figure(name, None, goal=_PEER_GOAL, detail={"why": _join_reasons(absent)})
    best = max(peers, key=lambda peer: rates[peer].clock.median)
    others = {peer: round(rates[OURS].clock.over(rates[peer].clock).median, 4) for peer in peers if peer != best}
    detail = {"best_peer": best, "to_others": others, "absent": dict(absent)}
    return compare_arms(name, rates, OURS, best, goal=_PEER_GOAL, detail=detail)


def _tokens_per_s(size: TrainerSize, case: TrainerCase, costs: Costs) -> Figure:
    trainers = {
        name: {
            "clock": round(size.rate(case, cost).median, 1),
            "processor": round(size.rate(case, cost, by="processor").median, 1),
            "way": cost[0].way,
        }
        for name, cost in costs.items()
    }
    return Figure(f"tokens_per_s_{case}", size.rate(case, costs[OURS]).median, detail={"trainers": trainers})


def _peak_memory(case: TrainerCase, costs: Costs) -> Figure:
    mib = {name: max(one.peak for one in cost) / _MIB for name, cost in costs.items()}
    trainers = {name: round(value, 1) for name, value in mib.items()}
    return Figure(f"peak_memory_{case}", mib[OURS] or None, "MiB", detail={"trainers": trainers})


def _join_reasons(absent: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in absent.items())


def _measure_trees(size: TrainerSize, selected: Selection, threads: int) -> Iterator[Figure]:
    """Compare three forms of training on requests with a draft tree in every verify step."""
    if not any(map(selected, _TREE_FIGURES)):
        return
    torch.set_num_threads(threads)
    whole = synthetic_data.build_tree_sample(SMOLLM2, size.request, _SEED)
    forms = {
        "tree": [whole],
        "chains": [synthetic_data.separate_chains(whole, SMOLLM2)],
        "branch": synthetic_data.split_branches(whole),
    }
    train = Train(warmup_steps=0, ttt_steps=TREE_TTT_STEPS, rejected_weight=0.1)
    learner = Learner(random_draft(SMOLLM2, _SEED), synthetic_data.random_embeddings(SMOLLM2, _SEED), train)
    nodes = len(size.request.roots) * len(TREE)

    def train_on(samples: Sequence[Sample]) -> int:
        learner.step(collate(samples))
        return nodes

    for samples in forms.values():
        train_on(samples)
    rates = run_alternating({name: lambda _, w=w: train_on(w) for name, w in forms.items()}, size.tree_trials)  # type: ignore[misc]
    detail = {
        "unit": "draft nodes per second",
        "trees": len(size.request.roots),
        "nodes_of_a_tree": len(TREE),
        "branches": len(whole.branches),
    }
    yield compare_arms("tree_vs_branch", rates, "tree", "branch", goal=_BRANCH_GOAL, detail=detail)
    yield compare_arms("tree_vs_chains", rates, "tree", "chains", detail=detail)
