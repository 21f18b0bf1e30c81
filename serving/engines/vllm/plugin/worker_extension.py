"""``--worker-extension-cls``: methods that vLLM adds to its workers, and calls between two steps when our node asks.

Every method returns a dictionary that JSON can carry; none raises.
"""

from __future__ import annotations

import logging
import multiprocessing.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from schemas.errors import UserError, describe_error
from schemas.settings import Settings, load
from schemas.speculator.checkpoint import CheckpointError, read_shape
from schemas.speculator.layouts import Shard
from serving.answers.answer_publisher import AnswerPublisher
from serving.answers.shared_corpus import SharedCorpus
from serving.engines.plugin.capture import HostTransfer
from serving.engines.plugin.metrics import CaptureLimit, PluginMetrics, SuffixMetrics
from serving.engines.plugin.recorder import Recorder, ReportedCorpus, model_folder, read_origin
from serving.engines.plugin.row_drafter import RowDrafter
from serving.engines.vllm.plugin import installation
from serving.engines.vllm.plugin.draft_reload import (
    DraftReload,
    HeldDraft,
    read_foreign_draft,
    read_held_draft,
    reload_layerwise,
)
from serving.engines.vllm.plugin.hybrid_hooks import HybridHooks
from serving.engines.vllm.plugin.runner_hooks import RunnerHooks
from serving.traces.chunks import Origin
from serving.traces.lag_consumer import LagConsumer
from serving.traces.publisher import TracePublisher

log = structlog.get_logger()


class WorkerExtension:
    """What vLLM's ``Worker`` gets. ``self`` is the worker."""

    _aurora_draft: DraftReload | None = None

    def aurora_start(self, folder: str, version: str) -> dict[str, Any]:
        """Start to record and to accept versions, unless it has been done.

        Args:
            folder: Version with which the server has started, as it was registered.
            version: Its name.

        Returns:
            ``version`` that drafts; ``why`` the server is not supported.
        """
        return _answer(lambda: {"version": self._aurora_started(Path(folder), version, is_own=True).version})

    def aurora_attach(self, folder: str, version: str) -> dict[str, Any]:
        """Start to record and to accept versions in a server that somebody else has started, unless it has been done.

        Args:
            folder: Version with which the line begins; the server may have started with another draft of its shape.
            version: Its name.

        Returns:
            ``version`` that drafts; ``depth`` of its drafts; ``why`` the server is not supported.
        """
        worker: Any = self

        def attach() -> dict[str, Any]:
            started = self._aurora_started(Path(folder), version, is_own=False)
            return {"version": started.version, "depth": worker.speculative_config.num_speculative_tokens}

        return _answer(attach)

    def aurora_read(self, folder: str, digest: str) -> dict[str, Any]:
        """Call ``DraftReload.read``; return ``is_read``, or ``why`` the version is not valid."""
        return _answer(lambda: {"is_read": self._aurora_reload().read(Path(folder), digest)})

    def aurora_load(self, version: str) -> dict[str, Any]:
        """Call ``DraftReload.load``; return the ``seconds`` without a step, or ``why`` it is not loaded."""
        return _answer(lambda: {"seconds": self._aurora_reload().load(version)})

    def _aurora_reload(self) -> DraftReload:
        if self._aurora_draft is None:
            raise UserError("aurora_start has not been called")
        return self._aurora_draft

    def _aurora_started(self, folder: Path, version: str, *, is_own: bool) -> DraftReload:
        if self._aurora_draft is None:
            _configure_logs()
            worker: Any = self
            layers = read_shape(folder).capture_layers
            if why := installation.check_installation() or installation.check_configuration(worker, layers):
                raise UserError(why)
            held = read_held_draft(folder, version) if is_own else _read_foreign(worker, folder, version)
            reload = partial(reload_layerwise, worker)
            draft = DraftReload(worker.model_runner.drafter.model, reload, held, _read_shard(worker))
            _install_hooks(worker, load(), draft, folder)
            self._aurora_draft = draft
        return self._aurora_draft


def _read_foreign(worker: Any, folder: Path, version: str) -> HeldDraft:
    """Read the files from which vLLM has loaded its draft."""
    own = model_folder(worker.speculative_config.draft_model_config.model)
    return read_foreign_draft(own, model_folder(worker.model_config.model), folder, version)


def _read_shard(worker: Any) -> Shard:
    """Return which part of the draft's tensors a worker holds; pipelines and replicas are rejected."""
    ranks = worker.parallel_config.tensor_parallel_size
    return Shard(worker.rank % ranks, ranks)


def _answer(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except (UserError, CheckpointError) as error:
        return {"why": str(error)}
    except Exception as error:
        # Any error would end the engine, and every request with it.
        log.exception("aurora_call_failed")
        return {"why": describe_error(error)}


def _install_hooks(worker: Any, settings: Settings, draft: DraftReload, folder: Path) -> None:
    hybrid, corpus, recording = None, None, None
    runner, transfer, version = worker.model_runner, HostTransfer(worker.device), lambda: draft.version
    if settings.serve.drafter == "hybrid":
        if why := installation.check_suffix_drafter(worker):
            log.warning("aurora_suffix_drafter_off", why=why)
        else:
            depth, vocabulary = worker.speculative_config.num_speculative_tokens, worker.model_config.get_vocab_size()
            corpus = ReportedCorpus(SharedCorpus(settings, vocabulary), SuffixMetrics("vllm"))
            drafter = RowDrafter(corpus.shared.corpus, depth, vocabulary)
            hybrid = HybridHooks(runner, drafter, transfer, corpus.metrics, version)
    # The ranks of a tensor-parallel group see the same.
    if settings.traces.enabled and worker.rank == 0:
        metrics, limit = PluginMetrics("vllm"), CaptureLimit(settings.vllm.max_capture_ratio)
        recorder = _create_recorder(worker, settings, folder, limit, metrics, corpus)
        verified_draft = hybrid.verified_draft if hybrid else None
        recording = RunnerHooks(runner, settings, recorder, transfer, limit, metrics, version, verified_draft)
    # The recording ones last: they read what the others have noted of the step.
    for hooks in (hybrid, recording):
        if hooks is not None:
            hooks.install()


def _create_recorder(
    worker: Any,
    settings: Settings,
    folder: Path,
    limit: CaptureLimit,
    metrics: PluginMetrics,
    corpus: ReportedCorpus | None,
) -> Recorder:
    target, width = worker.model_config.model, 3 * worker.model_config.get_hidden_size()

    def origin() -> Origin:
        return read_origin(settings.serve.node, target, str(folder), width, settings.target.fingerprint_cache)

    scope = settings.serve.suffix_scope
    answers = None if scope == "request" else AnswerPublisher(settings.kafka, scope)
    publisher = TracePublisher(settings.kafka, settings.traces, lag=LagConsumer(settings.kafka))
    recorder = Recorder(publisher, origin, limit, metrics, answers, corpus)
    # The worker lives in a child process of multiprocessing, which runs these and no functions of atexit.
    multiprocessing.util.Finalize(None, recorder.close, exitpriority=10)
    return recorder


def _configure_logs() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
