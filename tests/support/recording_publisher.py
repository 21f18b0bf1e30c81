"""Publishers of traces and answers that keep what they get."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.trace.record import VerifyStep
from serving.answers.answer_counts import AnswerCounts
from serving.engines.base import Finish, Request
from serving.traces.accounting import TraceCounts
from serving.traces.chunks import Origin


class Publisher:
    """Keeps the recorded verify steps."""

    circuit_breaker = "closed"

    def __init__(self) -> None:
        self.verify_steps: dict[str, list[VerifyStep]] = {}
        self.finished: dict[str, Finish] = {}
        self.requests: dict[str, Request] = {}

    def start(self, origin: Origin) -> None:
        self.origin = origin

    def sample(self, request: str) -> bool:
        return True

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        self.requests[request.id] = request
        self.verify_steps.setdefault(request.id, []).extend(verify_steps)
        if finish:
            self.finished[request.id] = finish

    def counts(self) -> TraceCounts:
        return TraceCounts(0, 0, {}, 0, 0)

    def close(self, timeout: float) -> TraceCounts:
        return self.counts()


class Answers:
    """Keeps the answers that it is to publish."""

    def __init__(self) -> None:
        self.started: tuple[str, str] | None = None
        self.outputs: dict[str, tuple[int, ...]] = {}

    def start(self, node: str, line: str) -> None:
        self.started = (node, line)

    def publish(self, request: Request, output: Sequence[int]) -> None:
        self.outputs[request.id] = tuple(output)

    def counts(self) -> AnswerCounts:
        return AnswerCounts(len(self.outputs), {"queue_full": 3})

    def close(self, timeout: float) -> AnswerCounts:
        return self.counts()
