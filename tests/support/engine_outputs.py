"""What an engine puts out: the outputs of requests, and the verify steps that it records."""

from collections.abc import Sequence
from queue import SimpleQueue

from schemas.trace.record import VerifyStep
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin.engine import BuiltinEngine


class Recorder:
    """A trace sink that keeps all verify steps."""

    def __init__(self) -> None:
        self.verify_steps: dict[str, list[VerifyStep]] = {}
        self.finished: dict[str, Finish] = {}

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        self.verify_steps.setdefault(request.id, []).extend(verify_steps)
        if finish is not None:
            self.finished[request.id] = finish


def submit(engine: BuiltinEngine, request: Request) -> SimpleQueue[Output]:
    outputs: SimpleQueue[Output] = SimpleQueue()
    engine.submit(request, outputs.put)
    return outputs


def collect(outputs: SimpleQueue[Output], seen: Sequence[Output] = ()) -> tuple[list[int], Output]:
    """Return all output tokens and the last output; ``seen`` was taken from the queue before."""
    taken = list(seen)
    while not taken or taken[-1].finish is None:
        taken.append(outputs.get(timeout=60))
    return [token for output in taken for token in output.tokens], taken[-1]
