"""One run over a stream of recorded traffic: a ``Course`` of the trainer's replay, in one order and with one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict

from ops import prompts
from ops.bench.learning.traffic import Traffic
from ops.bench.learning.variants import Order, Trial, settings_of
from schemas.device import device_of
from schemas.settings import Settings
from trainer.data.target import read_target
from trainer.replay.prequential import Asked, Course, Point


class Learned(BaseModel):
    """What a run came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    order: Order
    seed: int
    points: tuple[Point, ...]
    losses: tuple[float, ...]
    """Of the accepted term, by step."""
    trained_tokens: int
    """Tokens of all windows that were learned from, replayed ones each time."""
    training_s: float
    scoring_s: float


def in_order(traffic: Traffic, order: Order, seed: int) -> list[Asked]:
    """The requests as the stream brings them.

    A mixed stream is shuffled by the seed. An ordered one has a domain after the other, each shuffled in itself, and
    the seed says with which one it begins.
    """
    shuffled = random.Random(seed).sample(traffic.asked, len(traffic.asked))  # noqa: S311
    if order == "mixed":
        return shuffled
    first = seed % len(prompts.DOMAINS)
    place = {domain: i for i, domain in enumerate(prompts.DOMAINS[first:] + prompts.DOMAINS[:first])}
    return sorted(shuffled, key=lambda asked: place[asked.domain])


def learn(settings: Settings, traffic: Traffic, trial: Trial) -> Learned:
    """Run a trial to the end of the traffic; on an ordered one the draft of the first domain's end is scored beside."""
    settings = settings_of(settings, trial)
    torch.set_num_threads(settings.train.num_threads)
    torch.manual_seed(trial.seed)
    device = device_of(settings.train.device, "train.device")
    target, variant = read_target(settings).on(device), trial.variant
    course = Course(
        target.new_draft(),
        target.embeddings_VH,
        settings.train,
        seed=trial.seed,
        lookahead=variant.lookahead,
        branch_nodes=variant.branch_nodes,
    )
    stream: Sequence[Asked] = in_order(traffic, trial.order, trial.seed)
    for start in range(0, len(stream), course.batch):
        batch = stream[start : start + course.batch]
        if trial.order == "ordered" and course.static is None and batch[-1].domain != stream[0].domain:
            course.freeze()
        course.take(batch)
    told = course.standing().model_dump(include=set(Learned.model_fields))
    return Learned(name=variant.name, order=trial.order, seed=trial.seed, **told)
