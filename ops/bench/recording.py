"""Traces of a domain's requests, recorded once: a file for each request, encoded as it would go to Kafka."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

from pipeline.batches import Record, build
from schemas.errors import UserError
from schemas.trace.decoder import decode
from schemas.trace.record import CONTENT_TYPE, VerifyStep, encode, fingerprint
from serving.engines.base import Engine, Finish, Output, Request
from serving.traces.chunks import Assembly, Origin, Space, Way
from trainer.data.rows import window_of
from trainer.data.samples import Window

INDEX = "order.json"
"""File that names the requests of a folder in the order in which they were sent, by segment."""

_WHOLE = Way("inline", Space(sys.maxsize))
"""A file, unlike a Kafka message, may be as long as its request."""


class Recorder:
    """A ``TraceSink`` that keeps the verify steps of running requests and hands over those that ended."""

    def __init__(self) -> None:
        self.ended: SimpleQueue[tuple[Request, tuple[VerifyStep, ...], Finish]] = SimpleQueue()
        self._verify_steps: dict[str, list[VerifyStep]] = {}

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        """Take the next verify steps of a request."""
        kept = self._verify_steps.setdefault(request.id, [])
        kept.extend(verify_steps)
        if finish is not None:
            self.ended.put((request, tuple(self._verify_steps.pop(request.id)), finish))


def missing(folder: Path, requests: Sequence[Request]) -> list[Request]:
    """The requests that have no file yet."""
    return [request for request in requests if not _file(folder, request.id).exists()]


def record(
    engine: Engine, recorder: Recorder, requests: Sequence[Request], folder: Path, done: Callable[[int], None]
) -> None:
    """Answer the requests and write each one's trace when it ends, so that a run that was cut short goes on there.

    Args:
        engine: Started, with ``recorder`` as its sink, and room for all requests to wait.
        recorder: The sink.
        requests: What to record.
        folder: Where the files go.
        done: Told after each request how many are recorded.

    Raises:
        UserError: the engine did not finish a request.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for request in requests:
        engine.submit(request, _ignore)
    for number in range(1, len(requests) + 1):
        request, verify_steps, finish = recorder.ended.get()
        if finish not in ("stop", "length"):
            raise UserError(f"{request.id} ended with {finish!r}: {engine.health().error or 'the engine was stopped'}")
        _write(_file(folder, request.id), encode_request(request, verify_steps, finish, engine.target, engine.line))
        done(number)


def encode_request(
    request: Request, verify_steps: Sequence[VerifyStep], finish: Finish, target: str, line: str
) -> bytes:
    """All verify steps of a request as one chunk."""
    assembly = Assembly(request, Origin("bench", target, line), _WHOLE)
    full = [assembly.add(r) for r in verify_steps]
    chunk = assembly.end(finish)
    assert chunk is not None, "a request that has ended has verify steps"
    assert not any(full), "the engine hands over every verify step"
    return encode(chunk)


def read_window(folder: Path, request_id: str, target: str) -> Window:
    """The window of a recorded request, through the stream's code and the trainer's.

    Raises:
        UserError: it was recorded from another target.
        TraceError: the file was altered.
    """
    value = _file(folder, request_id).read_bytes()
    chunk = decode(value)
    if chunk.envelope.target != target:
        raise UserError(f"{folder}: recorded from another model than target.path; remove the folder")
    headers = {"content-type": CONTENT_TYPE, "schema": fingerprint(), "rows": str(len(chunk.verify_steps))}
    as_bytes = tuple((name, text.encode()) for name, text in headers.items())
    built = build([Record("recorded", 0, 0, 0, request_id.encode(), value, as_bytes)], context_tokens=0)
    if built.dead:
        raise UserError(f"{_file(folder, request_id)}: the stream would refuse it ({', '.join(built.dead)}); remove it")
    (accepted,) = built.rows["accepted"].to_pylist()
    return window_of(accepted, built.rows["rejected"].to_pylist())


def _file(folder: Path, request_id: str) -> Path:
    return folder / f"{request_id}.trace"


def _write(path: Path, value: bytes) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(value)
    unfinished.replace(path)


def _ignore(_output: Output) -> None:
    """The traces hold the answer."""
