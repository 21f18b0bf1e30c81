"""Entry point ``sglang.srt.plugins``: installs our hooks in SGLang's own server.

SGLang calls ``register`` in every process that it starts. Only the scheduler has steps; there, on the first rank of a
tensor-parallel group, recorder and suffix drafter start with the first step. A reason against one of them is logged
once, and the server runs without it.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import structlog

from schemas.settings import Settings, SettingsError, load
from serving.engines.sglang.plugin import compatibility

if TYPE_CHECKING:
    from serving.engines.plugin.capture import HostTransfer
    from serving.engines.plugin.metrics import CaptureLimit
    from serving.engines.plugin.recorder import Recorder, ReportedCorpus
    from serving.engines.sglang.plugin.chain_hooks import ChainHooks
    from serving.engines.sglang.plugin.hooks import Hooks, SglangMetrics
    from serving.traces.chunks import Origin

log = structlog.get_logger()
Hook = TypeVar("Hook", bound=Callable[..., Any])

DISABLED = "aurora_recording_disabled"


def register() -> None:
    """Check the settings and the installed SGLang, and register the hooks."""
    structlog.configure(
        processors=[
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    settings, why = _load_settings()
    why = why or compatibility.check_installation()
    if why:
        log.error(DISABLED, why=why)
    elif settings.traces.enabled or settings.serve.drafter == "hybrid":
        _register_hooks(Plugin(settings))


def _load_settings() -> tuple[Settings, str | None]:
    """Return the settings, or the defaults with the error of the settings."""
    try:
        return load(), None
    except SettingsError as error:
        return Settings(), str(error)


def _register_hooks(plugin: Plugin) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in (
        (compatibility.STEP, plugin.step, HookType.BEFORE),
        (compatibility.VERIFY, plugin.verify, HookType.BEFORE),
        (compatibility.SAMPLE, plugin.sample, HookType.BEFORE),
        (compatibility.PREFILL, plugin.prefill, HookType.AFTER),
        (compatibility.ACCEPT, plugin.accept, HookType.AROUND),
        (compatibility.RELEASE, plugin.release, HookType.BEFORE),
    ):
        HookRegistry.register(target, hook, kind)


def suppress_errors(hook: Hook) -> Hook:
    """Log a hook's error instead of raising it: the last guard, for code outside the guard that counts errors."""

    @wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception:
            # Any error would end the scheduler, and every request with it.
            log.exception("aurora_hook_failed", hook=hook.__name__)
            return None

    return run  # type: ignore[return-value]


class InstalledHooks(NamedTuple):
    """What runs in this process."""

    recording: Hooks | None = None
    suffix: ChainHooks | None = None


class Plugin:
    """The hooks with SGLang's signatures: they select the arguments that are used.

    No module that imports the metrics library is imported before the first step: SGLang sets the folder of the metrics
    files only after the plugins were loaded.

    Args:
        settings: Settings of traces, drafter and plugin.
        installed: What runs; None creates it at the first step, from the worker.
    """

    def __init__(self, settings: Settings, installed: InstalledHooks | None = None) -> None:
        self._settings = settings
        self._recording, self._suffix = installed or InstalledHooks()
        self._has_started = installed is not None

    @suppress_errors
    def step(self, worker: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run BEFORE a step."""
        if not self._has_started:
            self._has_started = True
            self._recording, self._suffix = _start(self._settings, worker)
        if self._recording:
            self._recording.on_step()

    @suppress_errors
    def verify(self, _worker: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run BEFORE the target verifies."""
        if self._suffix:
            self._suffix.on_drafted(batch)
        if self._recording:
            self._recording.on_drafted()

    @suppress_errors
    def sample(self, runner: Any, logits_output: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run BEFORE the target's next token is sampled."""
        if self._recording and not runner.is_draft_worker:
            self._recording.on_prefill_logits(logits_output)

    @suppress_errors
    def prefill(self, result: Any, _worker: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run AFTER a prefill."""
        if self._suffix:
            self._suffix.on_prefill(batch, result.next_token_ids)
        if self._recording:
            self._recording.on_prefill(result, batch)

    def accept(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run AROUND the acceptance: the logits are taken before it, the accepted nodes after it."""
        logits = self._before_accept(*args, **kwargs)
        result = original(*args, **kwargs)
        self._after_accept(logits, result, *args, **kwargs)
        return result

    @suppress_errors
    def release(self, req: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run BEFORE a request's memory is freed."""
        if self._suffix:
            self._suffix.on_release(req)
        if self._recording:
            self._recording.on_release(req)

    @suppress_errors
    def _before_accept(self, verify_input: Any, batch: Any, logits_output: Any, *_args: Any, **_kwargs: Any) -> Any:
        if not self._has_started:
            self._has_started = True
            log.error(DISABLED, why=compatibility.OTHER_WORKER)
        return self._recording.on_verify_logits(verify_input, batch, logits_output) if self._recording else None

    @suppress_errors
    def _after_accept(
        self, logits: Any, result: Any, verify_input: Any, batch: Any, logits_output: Any, *_args: Any, **_kwargs: Any
    ) -> None:
        if self._suffix:
            self._suffix.on_accepted(verify_input, batch, result)
        if self._recording and logits:
            self._recording.on_accepted(logits, verify_input, batch, logits_output, result)


def _start(settings: Settings, worker: Any) -> InstalledHooks:
    """Start to record and to draft, unless another process does, or there is a reason against it."""
    try:
        return _create_hooks(settings, worker)
    except SettingsError as error:
        why = str(error)
    except Exception:
        # No error of ours may end the server. It is logged once, since the start is tried once.
        log.exception(DISABLED)
        return InstalledHooks()
    log.error(DISABLED, why=why)
    return InstalledHooks()


def _create_hooks(settings: Settings, worker: Any) -> InstalledHooks:
    import torch
    from sglang.srt.runtime_context import get_parallel, get_serving

    from serving.engines.plugin.capture import HostTransfer
    from serving.engines.plugin.metrics import CaptureLimit
    from serving.engines.sglang.plugin.hooks import Hooks, SglangMetrics

    parallel, device = get_parallel(), torch.device(worker.device)
    if parallel.attn_tp_rank != 0:
        return InstalledHooks()
    is_eagle3 = worker.speculative_algorithm.is_eagle3()
    if why := compatibility.check_server(device.type, parallel.pp_size, is_eagle3=is_eagle3):
        log.error(DISABLED, why=why)
        return InstalledHooks()

    def version() -> str:
        return str(get_serving().weight_version)

    transfer = HostTransfer(device)
    suffix, corpus = _create_suffix_drafter(settings, worker, transfer, version) or (None, None)
    if not settings.traces.enabled:
        return InstalledHooks(suffix=suffix)
    metrics, limit = SglangMetrics(), CaptureLimit(settings.sglang.max_capture_ratio)
    recorder = _create_recorder(settings, worker, limit, metrics, corpus)
    verified_draft = suffix.verified_draft if suffix else None
    return InstalledHooks(Hooks(settings, recorder, transfer, limit, metrics, version, verified_draft), suffix)


def _create_suffix_drafter(
    settings: Settings, worker: Any, transfer: HostTransfer, version: Callable[[], str]
) -> tuple[ChainHooks, ReportedCorpus] | None:
    """Return the suffix drafter and its corpus; None where the speculator drafts alone."""
    from serving.answers.shared_corpus import SharedCorpus
    from serving.engines.plugin.metrics import SuffixMetrics
    from serving.engines.plugin.recorder import ReportedCorpus
    from serving.engines.plugin.row_drafter import RowDrafter
    from serving.engines.sglang.plugin.chain_hooks import ChainHooks

    if settings.serve.drafter != "hybrid":
        return None
    arguments = worker.server_args
    why = compatibility.check_suffix_drafter(
        arguments.tp_size, worker.topk, compares_probabilities=arguments.speculative_use_rejection_sampling
    )
    if why:
        log.warning("aurora_suffix_drafter_off", why=why)
        return None
    adaptive = worker.adaptive_controller
    depth = max(adaptive.candidate_steps) if adaptive else worker.speculative_num_steps
    vocabulary = worker.target_worker.model_runner.model_config.vocab_size
    corpus = ReportedCorpus(SharedCorpus(settings, vocabulary), SuffixMetrics("sglang"))
    drafter = RowDrafter(corpus.shared.corpus, depth, vocabulary)
    return ChainHooks(drafter, transfer, corpus.metrics, version), corpus


def _create_recorder(
    settings: Settings, worker: Any, limit: CaptureLimit, metrics: SglangMetrics, corpus: ReportedCorpus | None
) -> Recorder:
    from serving.answers.answer_publisher import AnswerPublisher
    from serving.engines.plugin.recorder import Recorder, read_origin
    from serving.traces.lag_consumer import LagConsumer
    from serving.traces.publisher import TracePublisher

    arguments, width = worker.server_args, 3 * worker.target_worker.model_runner.model_config.hidden_size

    def origin() -> Origin:
        model, draft = arguments.model_path, arguments.speculative_draft_model_path
        return read_origin(settings.serve.node, model, draft, width, settings.target.fingerprint_cache)

    scope = settings.serve.suffix_scope
    answers = None if scope == "request" else AnswerPublisher(settings.kafka, scope)
    publisher = TracePublisher(settings.kafka, settings.traces, lag=LagConsumer(settings.kafka))
    recorder = Recorder(publisher, origin, limit, metrics, answers, corpus)
    atexit.register(recorder.close)
    return recorder
