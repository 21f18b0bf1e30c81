"""Comparisons on a node that serves: the same prompts, answered in one way and in another, in turn.

The ways are those that the node itself offers: a request may ask for no speculation, and an operator may pin a version.
After a pin the node answers a few prompts that count for nobody, because it first has to see what the version is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import httpx
import psutil

from ops.bench.harness import Rates, run_alternating
from ops.demo.record import accepted_per_step
from ops.loadgen.load import Load, Prompt, Response, chat_request
from schemas.errors import UserError
from schemas.settings import Settings

_PIN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to answer."""

    speculate: bool
    version: str | None = None
    """Pinned for it; None drafts with whatever is served."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of a comparison."""

    at_once: int
    trials: int
    size: int
    """Prompts of a trial."""
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What a comparison came to, by arm."""

    at_once: int
    rates: Mapping[str, Rates]
    accepted_per_steps: Mapping[str, float | None]
    versions: Mapping[str, tuple[str, ...]]
    """Versions that drafted."""
    same_answers: float
    """Share of the prompts to which all arms gave the same text."""


class Node:
    """A node that serves, from outside."""

    def __init__(self, settings: Settings, pid: int, max_tokens: int) -> None:
        self._settings, self._max_tokens = settings, max_tokens
        self._url = f"http://{settings.serve.host}:{settings.serve.port}"
        self._process = psutil.Process(pid)

    def processor_s(self) -> float:
        """Processor time that it has used."""
        used = self._process.cpu_times()
        return float(used.user + used.system)

    def pin(self, version: str) -> None:
        """Serve this version until ``unpin``."""
        self._order("pin", {"version": version})

    def unpin(self) -> None:
        """Follow the alias again."""
        self._order("unpin", {})

    def load(self, prompts: Iterable[Prompt], at_once: int, *, speculate: bool = True, trace: bool = True) -> Load:
        """These prompts, to be sent."""
        name = self._settings.target.served_model_name
        requests = (chat_request(name, one, self._max_tokens, speculate=speculate, trace=trace) for one in prompts)
        return Load(self._url, requests, at_once)

    def answer(self, prompts: Sequence[Prompt], plan: Plan, *, speculate: bool) -> list[Response]:
        """Answers in the order in which they ended."""
        load = self.load(prompts, plan.at_once, speculate=speculate, trace=plan.trace)
        load.start()
        try:
            load.wait()
        finally:
            load.abandon()
        if errors := load.errors:
            raise UserError(f"{len(errors)} of {len(prompts)} requests failed: {errors[0]}")
        return load.responses

    def _order(self, what: str, body: Mapping[str, str]) -> None:
        token = self._settings.serve.admin_token.get_secret_value()
        try:
            answer = httpx.post(
                f"{self._url}/admin/speculator/{what}",
                json=body,
                headers={"authorization": f"Bearer {token}"},
                timeout=_PIN_TIMEOUT_S,
            )
        except httpx.HTTPError as error:
            raise UserError(f"{what} {' '.join(body.values())}: {error}") from error
        if answer.status_code != HTTPStatus.OK:
            raise UserError(f"{what} {' '.join(body.values())}: {answer.status_code} {answer.text[:200]}")


def compare(node: Node, arms: Mapping[str, Arm], prompts: Sequence[Prompt], plan: Plan) -> Measured:
    """Answer prompts in every way; what is pinned at the end stays so.

    Args:
        node: Nothing else may ask it meanwhile, unless that is part of what is measured.
        arms: By name.
        prompts: Those of a trial follow those of the trial before, from the beginning when they are used up. The last
            ones are what warms up.
        plan: How much.
    """
    answers: dict[str, list[Response]] = {name: [] for name in arms}
    pinned: str | None = None
    warm: set[str] = set()

    def prepare(name: str) -> None:
        nonlocal pinned
        arm = arms[name]
        if arm.version is not None and arm.version != pinned:
            node.pin(arm.version)
            pinned = arm.version
            warm.difference_update(other for other in arms if arms[other].speculate)
        if name not in warm:
            node.answer(prompts[-plan.size :], plan, speculate=arm.speculate)
            warm.add(name)

    def answering(name: str) -> Callable[[int], int]:
        def answer(trial: int) -> int:
            given = node.answer(of_trial(prompts, trial, plan.size), plan, speculate=arms[name].speculate)
            answers[name] += given
            return sum(answered.output_tokens for answered in given)

        return answer

    rates = run_alternating(
        {name: answering(name) for name in arms}, plan.trials, prepare=prepare, processor_s=node.processor_s
    )
    return Measured(
        at_once=plan.at_once,
        rates=rates,
        accepted_per_steps={name: accepted_per_step(given) for name, given in answers.items()},
        versions={name: drafted_by(given) for name, given in answers.items()},
        same_answers=same_answers(list(answers.values())),
    )


def of_trial(prompts: Sequence[Prompt], trial: int, size: int) -> list[Prompt]:
    """The prompts of a trial: the next ones, from the beginning when they are used up."""
    return [prompts[(trial * size + i) % len(prompts)] for i in range(size)]


def drafted_by(answers: Sequence[Response]) -> tuple[str, ...]:
    """The versions that drafted, in the order in which they began to."""
    return tuple(dict.fromkeys(version for answered in answers for version in answered.speculators))


def same_answers(arms: Sequence[Sequence[Response]]) -> float:
    """Share of the prompts to which all arms gave the same text; a prompt that came twice counts once."""
    texts = [{answered.prompt: answered.text for answered in arm} for arm in arms]
    return sum(len({arm[prompt] for arm in texts}) == 1 for prompt in texts[0]) / max(len(texts[0]), 1)
