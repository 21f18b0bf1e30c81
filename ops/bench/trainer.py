"""``aurora bench trainer``: training steps of this project's trainer beside those of public ones, from one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ops.bench import machine, trainer_data
from ops.bench.outcome import Report, Wanted, chosen
from ops.bench.paired import Figure, Goal, Rates, Samples, interleaved, ratio
from ops.bench.trainer_arm import OURS, Arm, started
from ops.bench.trainer_worker import TYPES, Done
from ops.local.stack import Say
from schemas.settings import Settings, Train
from schemas.speculator.network import random_draft
from trainer.data.samples import Window, collate
from trainer.loop.learner import Learner, products_in
from trainer.release.registration import code_revision

PEERS = ("speculators", "specforge")
_PEER_GOAL = Goal(1.5, at_least=True)
_BRANCH_GOAL = Goal(2.0, at_least=True)
_OVERALL = "ratio_to_best_peer"
_TREES = ("tree_vs_branch", "tree_vs_chains")
_MIB = 1 << 20
_SEED = 0
_TREE_STEPS = 5
"""K for the trees, which are four deep: step 0 predicts their first tokens."""

Took = Mapping[str, Sequence[Done]]
"""What the trials of a case took, by trainer."""


@dataclass(frozen=True, slots=True)
class Case:
    """One length of sequences and one length of the training-time test."""

    length: int
    ttt_steps: int

    def __str__(self) -> str:
        return f"t{self.length}_k{self.ttt_steps}"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    lengths: tuple[int, ...]
    ttt_steps: tuple[int, ...]
    tokens: int
    """Of a step: it has as many sequences as make them up."""
    steps: int
    """Of a trial."""
    trials: int
    tree_trials: int
    request: trainer_data.Request

    @property
    def cases(self) -> tuple[Case, ...]:
        """Every length with every number of steps."""
        return tuple(Case(length, steps) for length, steps in product(self.lengths, self.ttt_steps))


QUICK = Plan((128, 512), (3,), 512, steps=1, trials=3, tree_trials=3, request=trainer_data.Request(48, 32, 2))
FULL = Plan((128, 512), (3, 5), 1024, steps=1, trials=6, tree_trials=6, request=trainer_data.Request(96, 64, 2))


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    quick: bool
    only: tuple[str, ...]
    """Names of figures, or how they begin; none for all."""
    peers: Path
    """Environment that the public trainers are installed in."""

    @property
    def plan(self) -> Plan:
        """How much is measured."""
        return QUICK if self.quick else FULL


def names(plan: Plan) -> list[str]:
    """All figures that a plan measures."""
    of_case = (_OVERALL, "tokens_per_s", "peak_memory")
    return [_OVERALL, *(f"{name}_{case}" for case in plan.cases for name in of_case), *_TREES]


def run(settings: Settings, options: Options, say: Say) -> Report:
    """Measure.

    Raises:
        UserError: no such figure, or a trainer failed.
    """
    began, plan = time.monotonic(), options.plan
    wanted, threads = chosen(options.only, names(plan)), settings.train.num_threads
    described = machine.describe(threads)
    figures: list[Figure] = []
    trainers: dict[str, Any] = {}
    if any(wanted(name) for name in names(plan) if name not in _TREES):
        with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder:
            trainer_data.write(Path(folder), trainer_data.SMOLLM2, plan.lengths, plan.tokens, _SEED)
            figures, trainers = beside_peers(plan, options.peers, Path(folder), settings.train, say)
    figures += trees(plan, wanted, threads)
    described["load_average_after"] = machine.load_average()
    about = {
        "plan": asdict(plan),
        "draft": asdict(trainer_data.SMOLLM2),
        "trainers": trainers,
        "seconds": round(time.monotonic() - began, 1),
    }
    title = f"trainer on {described['processor']}, {threads} thread(s)"
    return Report(title, described, code_revision(), about, tuple(f for f in figures if wanted(f.name)))


def beside_peers(plan: Plan, peers: Path, data: Path, train: Train, say: Say) -> tuple[list[Figure], dict[str, Any]]:
    """All trainers in turn on the same sequences, in every second trial in the opposite order; and who they were.

    Each computes in the type of products in which it is fastest here, of those that ``train.dtype`` allows.

    Raises:
        UserError: a trainer failed.
    """
    with ExitStack() as stack:
        native = products_in(train.dtype, torch.device("cpu")) is torch.bfloat16
        types = [train.dtype] if train.dtype != "auto" else TYPES if native else TYPES[:1]
        arms, absent = started(stack, PEERS, peers, data, train.num_threads, types)
        for name, why in absent.items():
            say(f"{name} is left out: {why}")
        took: dict[Case, Took] = {}
        losses: dict[str, float] = {}
        for case in plan.cases:
            for name, arm in arms.items():
                losses.setdefault(name, arm.warm(trainer_data.case(case.length), case.ttt_steps).loss)
            took[case] = _trials(arms, case, plan)
            rates = {name: _rate(plan, case, done).median for name, done in took[case].items()}
            say(f"{case}: " + ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items()))
        about = {name: {**arm.about, "first_loss": round(losses[name], 4)} for name, arm in arms.items()}
    return judge(plan, took, absent), {**about, **{name: {"absent": why} for name, why in absent.items()}}


def _trials(arms: Mapping[str, Arm], case: Case, plan: Plan) -> Took:
    took: dict[str, list[Done]] = {name: [] for name in arms}
    for trial in range(plan.trials):
        for name in list(arms)[:: 1 if trial % 2 == 0 else -1]:
            took[name].append(arms[name].steps(trainer_data.case(case.length), case.ttt_steps, plan.steps))
    return took


def judge(plan: Plan, took: Mapping[Case, Took], absent: Mapping[str, str]) -> list[Figure]:
    """The figures of all cases."""
    figures: list[Figure] = []
    ratios: list[float] = []
    processor: list[float] = []
    for case, done in took.items():
        compared = _beside_best(plan, case, done, absent)
        if compared.samples:
            ratios += compared.samples.values
            processor.append((compared.detail or {})["by_processor_time"])
        figures += [compared, _tokens_per_s(plan, case, done), _peak_memory(case, done)]
    if not ratios:
        return [Figure(_OVERALL, None, goal=_PEER_GOAL, detail={"why": _why(absent)}), *figures]
    samples = Samples(tuple(ratios))
    detail = {"by_processor_time": round(median(processor), 4)}
    return [Figure(_OVERALL, samples.median, goal=_PEER_GOAL, samples=samples, detail=detail), *figures]


def _beside_best(plan: Plan, case: Case, took: Took, absent: Mapping[str, str]) -> Figure:
    name = f"{_OVERALL}_{case}"
    rates = {arm: Rates(_rate(plan, case, done), _rate(plan, case, done, by="processor")) for arm, done in took.items()}
    peers = [peer for peer in PEERS if peer in rates]
    if not peers:
        return Figure(name, None, goal=_PEER_GOAL, detail={"why": _why(absent)})
    best = max(peers, key=lambda peer: rates[peer].clock.median)
    others = {peer: round(rates[OURS].clock.over(rates[peer].clock).median, 4) for peer in peers if peer != best}
    detail = {"best_peer": best, "to_others": others, "absent": dict(absent)}
    return ratio(name, rates, OURS, best, goal=_PEER_GOAL, detail=detail)


def _tokens_per_s(plan: Plan, case: Case, took: Took) -> Figure:
    told = {
        name: {
            "clock": round(_rate(plan, case, done).median, 1),
            "processor": round(_rate(plan, case, done, by="processor").median, 1),
            "way": done[0].way,
        }
        for name, done in took.items()
    }
    return Figure(f"tokens_per_s_{case}", _rate(plan, case, took[OURS]).median, detail={"trainers": told})


def _peak_memory(case: Case, took: Took) -> Figure:
    mib = {name: max(one.peak for one in done) / _MIB for name, done in took.items()}
    told = {name: round(value, 1) for name, value in mib.items()}
    return Figure(f"peak_memory_{case}", mib[OURS] or None, "MiB", detail={"trainers": told})


def _rate(plan: Plan, case: Case, took: Sequence[Done], by: str = "seconds") -> Samples:
    """Tokens a second, by trial."""
    tokens = plan.tokens // case.length * case.length * plan.steps
    return Samples(tuple(tokens / getattr(done, by) for done in took))


def _why(absent: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in absent.items())


def trees(plan: Plan, wanted: Wanted, threads: int) -> Iterator[Figure]:
    """Requests whose every verify step drafted a tree, learned from in three forms, in turn."""
    if not any(map(wanted, _TREES)):
        return
    torch.set_num_threads(threads)
    shape = trainer_data.SMOLLM2
    whole = trainer_data.drafted_window(shape, plan.request, _SEED)
    forms = {
        "tree": [whole],
        "chains": [trainer_data.as_chains(whole, shape)],
        "branch": trainer_data.branch_by_branch(whole),
    }
    train = Train(warmup_steps=0, ttt_steps=_TREE_STEPS, rejected_weight=0.1)
    learner = Learner(random_draft(shape, _SEED), trainer_data.embeddings_of(shape, _SEED), train)
    nodes = len(plan.request.roots) * len(trainer_data.TREE)

    def learn(windows: Sequence[Window]) -> int:
        learner.step(collate(windows))
        return nodes

    for windows in forms.values():
        learn(windows)
    rates = interleaved({name: lambda _, w=w: learn(w) for name, w in forms.items()}, plan.tree_trials)  # type: ignore[misc]
    detail = {
        "unit": "drafted nodes a second",
        "trees": len(plan.request.roots),
        "nodes_of_a_tree": len(trainer_data.TREE),
        "branches": len(whole.branches),
    }
    yield ratio("tree_vs_branch", rates, "tree", "branch", goal=_BRANCH_GOAL, detail=detail)
    yield ratio("tree_vs_chains", rates, "tree", "chains", detail=detail)
