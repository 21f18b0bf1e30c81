"""Comparisons on a serving node: the same prompts in different ways, in turn.

The ways are those of the node's API: a request may disable speculation, and an operator may pin a version. After a pin
the node runs a few prompts that are not measured, because it first has to measure how much drafting pays with the
version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus

import httpx
import psutil

from ops.bench.harness import Rates, run_alternating
from ops.demo.record import accepted_per_step
from ops.loadgen.load import Load, Prompt, Response, chat_request
from schemas.errors import UserError
from schemas.settings import Settings

_PIN_TIMEOUT_S = 60.0
_PLAIN = "-no-speculation"
"""Suffix of the label of traced requests without speculation: drafters then never continue answers of another arm."""


@dataclass(frozen=True, slots=True)
class NodeArm:
    """A way to run requests."""

    speculate: bool
    version: str | None = None
    """Pinned for the arm; None keeps the active version."""


@dataclass(frozen=True, slots=True)
class ComparisonSize:
    """The size of a comparison."""

    concurrency: int
    trials: int
    prompts: int
    """Of a trial."""
    trace: bool = False


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """The measurements of a comparison, by arm."""

    concurrency: int
    rates: Mapping[str, Rates]
    accepted_per_step: Mapping[str, float | None]
    versions: Mapping[str, tuple[str, ...]]
    """Versions that drafted."""
    same_answers: float
    """Share of the prompts for which all arms returned the same text."""


class ServingNode:
    """A serving node behind its API."""

    def __init__(self, settings: Settings, pid: int, max_tokens: int) -> None:
        self._settings, self._max_tokens = settings, max_tokens
        self._url = f"http://{settings.serve.host}:{settings.serve.port}"
        self._process = psutil.Process(pid)

    def processor_s(self) -> float:
        """Return the processor seconds that the node has used."""
        used = self._process.cpu_times()
        return float(used.user + used.system)

    def pin(self, version: str) -> None:
        """Pin a version. Raises ``UserError`` if the node does not."""
        self._post_admin("pin", {"version": version})

    def unpin(self) -> None:
        """Let the node follow the alias again. Raises ``UserError`` if the node does not."""
        self._post_admin("unpin", {})

    def _post_admin(self, action: str, body: Mapping[str, str]) -> None:
        headers = {"authorization": f"Bearer {self._settings.serve.admin_token.get_secret_value()}"}
        url, what = f"{self._url}/admin/speculator/{action}", " ".join([action, *body.values()])
        try:
            response = httpx.post(url, json=body, headers=headers, timeout=_PIN_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise UserError(f"{what}: {error}") from error
        if response.status_code != HTTPStatus.OK:
            raise UserError(f"{what}: {response.status_code} {response.text[:200]}")

    def load(self, prompts: Iterable[Prompt], concurrency: int, *, speculate: bool = True, trace: bool = True) -> Load:
        """Return a load of these prompts, not started."""
        name = self._settings.target.served_model_name
        requests = (
            chat_request(name, prompt, self._max_tokens, speculate=speculate, trace=trace) for prompt in prompts
        )
        return Load(self._url, requests, concurrency)

    def run_requests(self, prompts: Sequence[Prompt], size: ComparisonSize, *, speculate: bool) -> list[Response]:
        """Return the requests in the order in which they finished. Raises ``UserError`` if one failed."""
        if size.trace and not speculate:
            prompts = [replace(prompt, domain=f"{prompt.domain}{_PLAIN}") for prompt in prompts]
        load = self.load(prompts, size.concurrency, speculate=speculate, trace=size.trace)
        load.start()
        try:
            load.wait()
        finally:
            load.abandon()
        if load.errors:
            raise UserError(f"{len(load.errors)} of {len(prompts)} requests failed: {load.errors[0]}")
        return load.responses


def compare_on_node(
    node: ServingNode, arms: Mapping[str, NodeArm], prompts: Sequence[Prompt], size: ComparisonSize
) -> ComparisonResult:
    """Run the prompts in every way; the last pinned version stays pinned.

    Args:
        node: Without other requests, unless they are part of the measurement.
        arms: The ways, by name.
        prompts: Every trial uses the next ones, in a cycle. The last ones warm up.
        size: The size of the comparison.
    """
    responses: dict[str, list[Response]] = {name: [] for name in arms}
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
            node.run_requests(prompts[-size.prompts :], size, speculate=arm.speculate)
            warm.add(name)

    def arm_of(name: str) -> Callable[[int], int]:
        def run_trial(trial: int) -> int:
            selected = trial_prompts(prompts, trial, size.prompts)
            finished = node.run_requests(selected, size, speculate=arms[name].speculate)
            responses[name] += finished
            return sum(response.output_tokens for response in finished)

        return run_trial

    rates = run_alternating(
        {name: arm_of(name) for name in arms}, size.trials, prepare=prepare, processor_s=node.processor_s
    )
    return ComparisonResult(
        concurrency=size.concurrency,
        rates=rates,
        accepted_per_step={name: accepted_per_step(finished) for name, finished in responses.items()},
        versions={
            name: tuple(dict.fromkeys(version for response in finished for version in response.speculators))
            for name, finished in responses.items()
        },
        same_answers=share_of_same_answers(list(responses.values())),
    )


def trial_prompts(prompts: Sequence[Prompt], trial: int, size: int) -> list[Prompt]:
    """Return the next ``size`` prompts, in a cycle."""
    return [prompts[(trial * size + i) % len(prompts)] for i in range(size)]


def share_of_same_answers(arms: Sequence[Sequence[Response]]) -> float:
    """Return the share of the prompts for which all arms returned the same text; a repeated prompt counts once."""
    texts = [{response.prompt: response.text for response in arm} for arm in arms]
    return sum(len({arm[prompt] for arm in texts}) == 1 for prompt in texts[0]) / max(len(texts[0]), 1)
