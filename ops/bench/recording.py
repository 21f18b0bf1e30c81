"""Recorded requests: the trace of each in a file of its own, encoded as it would go to Kafka."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ops.bench import prompts
from ops.bench.harness import Say
from ops.local.stack import provide_target
from ops.replay.trace_import import read_record
from pipeline.batches import build
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.trace.decoder import decode
from schemas.trace.record import VerifyStep, encode
from serving.engines.base import Engine, Finish, Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.traces.chunks import ChunkBuilder, ChunkSize, FeatureTransport, Origin
from trainer.data.samples import Sample, read_sample

_UNLIMITED = FeatureTransport("inline", ChunkSize(sys.maxsize))
"""A file, unlike a Kafka message, may be as long as its request."""
_BATCH = 16
_PROGRESS_EVERY = 25

FinishedRequest = tuple[Request, tuple[VerifyStep, ...], Finish]


class Recorder:
    """A ``TraceSink`` that keeps the verify steps of running requests and queues the requests that finished."""

    def __init__(self) -> None:
        self.finished: SimpleQueue[FinishedRequest] = SimpleQueue()
        self._verify_steps: dict[str, list[VerifyStep]] = {}

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        """Keep the next verify steps of a request."""
        kept = self._verify_steps.setdefault(request.id, [])
        kept.extend(verify_steps)
        if finish is not None:
            self.finished.put((request, tuple(self._verify_steps.pop(request.id)), finish))


def recordings_folder(settings: Settings, domain: str) -> Path:
    """Return the folder of the recorded requests of a domain."""
    return Path(settings.stack.data_dir) / "bench" / "recorded" / domain


def find_missing(folder: Path, requests: Sequence[Request]) -> list[Request]:
    """Return the requests that are not recorded yet."""
    return [request for request in requests if not _trace_file(folder, request.id).exists()]


@contextmanager
def recording_engine(settings: Settings, waiting: int, **serve: Any) -> Iterator[tuple[BuiltinEngine, Recorder]]:
    """Run an engine with a recorder as its sink, and place for so many waiting requests."""
    changed = settings.serve.model_copy(update={"max_num_seqs": _BATCH, "max_waiting_requests": waiting, **serve})
    recorder = Recorder()
    engine = BuiltinEngine(settings.model_copy(update={"serve": changed}), recorder)
    engine.start()
    try:
        yield engine, recorder
    finally:
        engine.stop()


def run_requests(engine: Engine, recorder: Recorder, requests: Sequence[Request]) -> Iterator[FinishedRequest]:
    """Submit all requests, and yield each with its verify steps when it finishes.

    Raises:
        UserError: a request failed, or the engine was stopped.
    """
    for request in requests:
        engine.submit(request, lambda _output: None)
    for _ in requests:
        request, verify_steps, finish = recorder.finished.get()
        if finish not in ("stop", "length"):
            raise UserError(f"{request.id} ended with {finish!r}: {engine.health().error or 'the engine was stopped'}")
        yield request, verify_steps, finish


def record_requests(
    engine: Engine,
    recorder: Recorder,
    requests: Sequence[Request],
    folder: Path,
    on_recorded: Callable[[int], None] = lambda _: None,
) -> None:
    """Run the requests and write each one's trace when it finishes, so that an interrupted run can be continued.

    Args:
        engine: Started, with ``recorder`` as its sink, and place for all requests to wait.
        recorder: The sink.
        requests: The requests to record.
        folder: Where the files are written.
        on_recorded: Called after each request with the number of recorded requests.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (request, verify_steps, finish) in enumerate(run_requests(engine, recorder, requests), start=1):
        path = _trace_file(folder, request.id)
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(_encode_request(request, verify_steps, finish, engine.target, engine.line))
        unfinished.replace(path)
        on_recorded(number)


def record_domain(settings: Settings, domain: str, number: int, max_tokens: int, say: Say) -> list[str]:
    """Record the first ``number`` training requests of a domain where they are missing; return their ids."""
    provide_target(settings.target, say)
    folder = recordings_folder(settings, domain)
    tokenizer = prompts.load_tokenizer(Path(settings.target.path))
    texts = prompts.tokenize(tokenizer, prompts.training_prompts(domain))
    requests = prompts.training_requests(domain, texts, number, max_tokens)
    if missing := find_missing(folder, requests):
        say(f"recording {len(missing)} requests of up to {max_tokens} tokens into {folder}")
        started = time.monotonic()

        def report_progress(recorded: int) -> None:
            if recorded % _PROGRESS_EVERY == 0 or recorded == len(missing):
                say(f"recorded {recorded} of {len(missing)}, {time.monotonic() - started:.0f} s")

        with recording_engine(settings, len(missing), speculate=False) as (engine, recorder):
            record_requests(engine, recorder, missing, folder, report_progress)
    return [request.id for request in requests]


def read_recorded_sample(folder: Path, request_id: str, target: str) -> Sample:
    """Return the sample of a recorded request, built by the code of the stream and of the trainer."""
    record = read_record(folder, request_id, 0)
    assert record.value is not None, "a recorded request has a value"
    if decode(record.value).envelope.target != target:
        raise UserError(f"{folder}: recorded from another model than target.path; remove the folder")
    built = build([record], context_tokens=0)
    if built.dead_letters:
        reasons = ", ".join(built.dead_letters)
        raise UserError(f"{_trace_file(folder, request_id)}: the stream would reject it ({reasons}); remove it")
    (accepted,) = built.rows["accepted"].to_pylist()
    return read_sample(accepted, built.rows["rejected"].to_pylist())


def _encode_request(
    request: Request, verify_steps: Sequence[VerifyStep], finish: Finish, target: str, line: str
) -> bytes:
    """Encode all verify steps of a request as one chunk."""
    builder = ChunkBuilder(request, Origin("bench", target, line), _UNLIMITED)
    full = [builder.add(step) for step in verify_steps]
    chunk = builder.end(finish)
    assert chunk is not None, "a request that has ended has verify steps"
    assert not any(full), "the engine hands over every verify step"
    return encode(chunk)


def _trace_file(folder: Path, request_id: str) -> Path:
    return folder / f"{request_id}.trace"
