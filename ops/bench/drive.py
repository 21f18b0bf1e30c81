"""Drive an engine in this process: so many requests at a time, with the time of every output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise
from queue import SimpleQueue

from serving.engines.base import Engine, Finish, Output, Request, RequestStats


@dataclass(slots=True)
class Answer:
    """One request's outputs as they came; times are monotonic seconds."""

    request: Request
    submitted: float
    times: list[float] = field(default_factory=list)
    """Of each output that carried tokens."""
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: str | None = None
    stats: RequestStats | None = None

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.submitted

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Beginning and end of each wait between two outputs."""
        return list(pairwise(self.times))


@dataclass(frozen=True, slots=True)
class Run:
    """Answers in the order in which they ended."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens answered."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def rate(self) -> float:
        """Tokens a second, prompts' reading included."""
        return self.tokens / self.seconds

    @property
    def failed(self) -> int:
        """Requests that ended in another way than by their length or an end token."""
        return sum(answer.finish not in ("stop", "length") for answer in self.answers)

    @property
    def accepted_per_step(self) -> float:
        """Accepted tokens a verify step; the bonus token is not in it."""
        stats = [answer.stats for answer in self.answers if answer.stats]
        return sum(s.accepted_tokens for s in stats) / max(sum(s.verify_steps for s in stats), 1)


def drive(engine: Engine, requests: Iterable[Request], at_once: int) -> Run:
    """Answer the requests, ``at_once`` of them in the engine at any time until they run out."""
    left, ended, answers = iter(requests), SimpleQueue[Answer](), []
    began = time.perf_counter()
    running = sum(_submit(engine, request, ended) for request in islice(left, at_once))
    while running:
        answers.append(ended.get())
        running -= 1
        running += sum(_submit(engine, request, ended) for request in islice(left, 1))
    return Run(tuple(answers), time.perf_counter() - began)


def _submit(engine: Engine, request: Request, ended: SimpleQueue[Answer]) -> int:
    answer = Answer(request, time.perf_counter())
    engine.submit(request, _taking(answer, ended.put))
    return 1


def _taking(answer: Answer, ended: Callable[[Answer], None]) -> Callable[[Output], None]:
    def take(output: Output) -> None:
        if output.tokens:
            answer.times.append(time.perf_counter())
            answer.tokens.extend(output.tokens)
        if output.finish is not None:
            answer.finish, answer.error, answer.stats = output.finish, output.error, output.stats
            ended(answer)

    return take
