"""Trials over recorded traffic; each result is kept under a hash of everything that it depends on except the code."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from ops.bench import prompts
from ops.bench.harness import Say
from ops.bench.learning.recorded_traffic import GREEDY, RecordedTraffic, TrafficKind, read_traffic
from ops.bench.learning.variants import LearningTrial, Order, trial_settings, variant_values
from ops.replay.process_pool import run_in_processes
from ops.replay.suffix_replay import NodeSuffixReplay
from schemas.device import select_device
from schemas.settings import Settings
from trainer.data.samples import Sample
from trainer.data.target import read_target
from trainer.replay.learning_curve import final_accepted_per_step, mean_accepted_per_step
from trainer.replay.past_requests import PastRequest, RequestService
from trainer.replay.prequential import BatchScore, PrequentialRun


class TrialResult(BaseModel):
    """The result of a trial."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    order: Order
    seed: int
    scores: tuple[BatchScore, ...]
    losses: tuple[float, ...]
    """Of the accepted term, by training step."""
    trained_tokens: int
    """Tokens of all samples that were trained on, replayed ones each time."""
    training_s: float
    scoring_s: float

    @property
    def training_tokens_per_s(self) -> float:
        """Tokens trained on per second of training."""
        return self.trained_tokens / max(self.training_s, 1e-9)


def order_stream(traffic: RecordedTraffic, order: Order, seed: int) -> list[Sample]:
    """Return the requests in the order of the stream.

    A mixed stream is shuffled by the seed. An ordered one has one domain after the other, each shuffled in itself, and
    the seed selects the first domain. The recorded order is the same for every seed.
    """
    if order == "recorded":
        return list(traffic.requests)
    shuffled = random.Random(seed).sample(traffic.requests, len(traffic.requests))  # noqa: S311
    if order == "mixed":
        return shuffled
    first = seed % len(prompts.DOMAINS)
    rank = {domain: i for i, domain in enumerate(prompts.DOMAINS[first:] + prompts.DOMAINS[:first])}
    return sorted(shuffled, key=lambda request: rank[request.label or ""])


def as_past_request(sample: Sample, number: int) -> PastRequest:
    """Return a request of the stream, which begins when the one before it has ended."""
    assert sample.next_token is not None, "a recorded request holds its last token"
    assert sample.sampling is not None, "a recorded request holds how it was sampled"
    began = datetime.fromtimestamp(number, UTC)
    return PastRequest(
        request=sample.request,
        label=sample.label,
        sampling=sample.sampling,
        service=RequestService("bench", began, began),
        tokens_N=torch.cat([sample.tokens, torch.tensor([sample.next_token])]),
        features_NF=sample.features,
        prompt=int(sample.known.nonzero()[0]) + 1,
        teacher=sample.teacher,
    )


def run_trial(settings: Settings, traffic: RecordedTraffic, trial: LearningTrial) -> TrialResult:
    """Run a trial to the end of the traffic; on an ordered stream the draft is frozen when the first domain ends."""
    settings = trial_settings(settings, trial)
    torch.set_num_threads(settings.train.num_threads)
    torch.manual_seed(trial.seed)
    device = select_device(settings.train.device, "train.device")
    target, variant = read_target(settings).to(device), trial.variant
    run = PrequentialRun(
        target.new_draft(),
        target.embeddings_VH,
        settings.train,
        seed=trial.seed,
        lookahead=variant.lookahead,
        branch_nodes=variant.branch_nodes,
    )
    stream, suffix = order_stream(traffic, trial.order, trial.seed), NodeSuffixReplay(settings)
    for start in range(0, len(stream), run.new_per_step):
        batch = stream[start : start + run.new_per_step]
        if trial.order == "ordered" and run.static is None and batch[-1].label != stream[0].label:
            run.freeze()
        run.train(batch, [suffix.accept(as_past_request(one, start + i)) for i, one in enumerate(batch)])
    measured = run.state().model_dump(include=set(TrialResult.model_fields))
    return TrialResult(name=variant.name, order=trial.order, seed=trial.seed, **measured)


def results_folder(settings: Settings) -> Path:
    """Return the folder of the results."""
    return Path(settings.stack.data_dir) / "bench" / "learning"


def result_file(settings: Settings, trial: LearningTrial, digest: str) -> Path:
    """Return the file of the result of a trial over the traffic with that digest."""
    variant = trial.variant
    depends_on = {
        "settings": variant_values(settings, variant),
        "lookahead": variant.lookahead,
        "branch_nodes": variant.branch_nodes,
        "order": trial.order,
        "seed": trial.seed,
        "traffic": digest,
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
    return results_folder(settings) / f"{key}.json"


def run_trials(
    settings: Settings,
    trials: Sequence[LearningTrial],
    tokens: int | None,
    processes: int,
    say: Say,
    kind: TrafficKind = GREEDY,
) -> tuple[RecordedTraffic, dict[LearningTrial, TrialResult]]:
    """Run the trials without a result; return the traffic and all results.

    Args:
        settings: Target, recordings, and everything that variants do not change.
        trials: In the order in which they start.
        tokens: Tokens of the recorded traffic to use; all if None.
        processes: Number of parallel trials.
        say: Called before the first trial and after each one.
        kind: Which recording is read.
    """
    traffic = read_traffic(settings, tokens, kind)
    files = {trial: result_file(settings, trial, traffic.digest) for trial in trials}
    # Variants with equal settings are run once.
    missing = list({file: trial for trial, file in files.items() if not file.exists()}.values())
    say(
        f"{len(traffic.requests)} requests, {traffic.tokens} tokens of traffic; "
        f"{len(missing)} of {len(trials)} trials are new"
    )
    started = time.monotonic()
    for number, (trial, result) in enumerate(_run_each(missing, traffic, processes, (settings, tokens, kind)), start=1):
        files[trial].parent.mkdir(parents=True, exist_ok=True)
        unfinished = files[trial].with_suffix(".part")
        unfinished.write_text(result.model_dump_json() + "\n")
        unfinished.replace(files[trial])
        say(
            f"{number} of {len(missing)}, {time.monotonic() - started:.0f} s: {result.name}, {result.order}, "
            f"seed {result.seed}: {mean_accepted_per_step(result.scores):.3f} tokens accepted per step over all, "
            f"{final_accepted_per_step(result.scores):.3f} at the end"
        )
    return traffic, {trial: TrialResult.model_validate_json(file.read_text()) for trial, file in files.items()}


def _run_each(
    trials: Sequence[LearningTrial],
    traffic: RecordedTraffic,
    processes: int,
    read: tuple[Settings, int | None, TrafficKind],
) -> Iterator[tuple[LearningTrial, TrialResult]]:
    """Run the trials here or in processes, each of which reads the traffic by the arguments ``read``."""
    if processes == 1 or len(trials) < 2:
        yield from ((trial, run_trial(read[0], traffic, trial)) for trial in trials)
        return
    yield from run_in_processes(_TrialProcess.run, trials, processes, _TrialProcess.start, read)


class _TrialProcess:
    """A process that reads the traffic once and runs one trial after the other."""

    settings: Settings
    traffic: RecordedTraffic

    @classmethod
    def start(cls, settings: Settings, tokens: int | None, kind: TrafficKind) -> None:
        cls.settings, cls.traffic = settings, read_traffic(settings, tokens, kind)

    @classmethod
    def run(cls, trial: LearningTrial) -> TrialResult:
        return run_trial(cls.settings, cls.traffic, trial)
