"""Entry point ``sglang.srt.plugins``: installs our hooks in SGLang's own server.

SGLang calls ``register`` in every process that it starts. Only the scheduler has steps; there, on the first rank of a
tensor-parallel group, the recorder starts with the first step. A reason against recording is logged once, and the
server runs without it.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from schemas.settings import Settings, SettingsError, load
from serving.engines.sglang.plugin import compatibility

if TYPE_CHECKING:
    from serving.engines.sglang.plugin.hooks import Hooks

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
    elif settings.traces.enabled:
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


class Plugin:
    """The hooks with SGLang's signatures: they select the arguments that are used.

    No module that imports the metrics library is imported before the first step: SGLang sets the folder of the metrics
    files only after the plugins were loaded.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._hooks: Hooks | None = None
        self._has_started = False

    @suppress_errors
    def step(self, worker: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run BEFORE a step."""
        if not self._has_started:
            self._has_started = True
            self._hooks = _start(self._settings, worker)
        if self._hooks:
            self._hooks.on_step()

    @suppress_errors
    def verify(self, *_args: Any, **_kwargs: Any) -> None:
        """Run BEFORE the target verifies."""
        if self._hooks:
            self._hooks.on_drafted()

    @suppress_errors
    def sample(self, runner: Any, logits_output: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run BEFORE the target's next token is sampled."""
        if self._hooks and not runner.is_draft_worker:
            self._hooks.on_prefill_logits(logits_output)

    @suppress_errors
    def prefill(self, result: Any, _worker: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run AFTER a prefill."""
        if self._hooks:
            self._hooks.on_prefill(result, batch)

    def accept(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run AROUND the acceptance: the logits are taken before it, the accepted nodes after it."""
        logits = self._before_accept(*args, **kwargs)
        result = original(*args, **kwargs)
        self._after_accept(logits, result, *args, **kwargs)
        return result

    @suppress_errors
    def release(self, req: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run BEFORE a request's memory is freed."""
        if self._hooks:
            self._hooks.on_release(req)

    @suppress_errors
    def _before_accept(self, verify_input: Any, batch: Any, logits_output: Any, *_args: Any, **_kwargs: Any) -> Any:
        if not self._has_started:
            self._has_started = True
            log.error(DISABLED, why=compatibility.OTHER_WORKER)
        return self._hooks.on_verify_logits(verify_input, batch, logits_output) if self._hooks else None

    @suppress_errors
    def _after_accept(
        self, logits: Any, result: Any, verify_input: Any, batch: Any, logits_output: Any, *_args: Any, **_kwargs: Any
    ) -> None:
        if self._hooks and logits:
            self._hooks.on_accepted(logits, verify_input, batch, logits_output, result)


def _start(settings: Settings, worker: Any) -> Hooks | None:
    """Start to record, unless another process records, or there is a reason against it."""
    try:
        return _create_hooks(settings, worker)
    except SettingsError as error:
        why = str(error)
    except Exception:
        # No error of ours may end the server. It is logged once, since the start is tried once.
        log.exception(DISABLED)
        return None
    log.error(DISABLED, why=why)
    return None


def _create_hooks(settings: Settings, worker: Any) -> Hooks | None:
    import torch
    from sglang.srt.runtime_context import get_parallel, get_serving

    from serving.answers.answer_publisher import AnswerPublisher
    from serving.engines.plugin.capture import HostTransfer
    from serving.engines.plugin.metrics import CaptureLimit
    from serving.engines.plugin.recorder import Recorder, read_origin
    from serving.engines.sglang.plugin.hooks import Hooks, SglangMetrics
    from serving.traces.lag_consumer import LagConsumer
    from serving.traces.publisher import TracePublisher

    parallel, arguments, device = get_parallel(), worker.server_args, torch.device(worker.device)
    if parallel.attn_tp_rank != 0:
        return None
    is_eagle3 = worker.speculative_algorithm.is_eagle3()
    if why := compatibility.check_server(device.type, parallel.pp_size, is_eagle3=is_eagle3):
        log.error(DISABLED, why=why)
        return None
    transfer, metrics = HostTransfer(device), SglangMetrics()
    limit = CaptureLimit(settings.sglang.max_capture_ratio)
    width = 3 * worker.target_worker.model_runner.model_config.hidden_size

    def origin() -> Any:
        model, draft = arguments.model_path, arguments.speculative_draft_model_path
        return read_origin(settings.serve.node, model, draft, width, settings.target.fingerprint_cache)

    scope = settings.serve.suffix_scope
    answers = None if scope == "request" else AnswerPublisher(settings.kafka, scope)
    publisher = TracePublisher(settings.kafka, settings.traces, lag=LagConsumer(settings.kafka))
    recorder = Recorder(publisher, origin, limit, metrics, answers)
    atexit.register(recorder.close)
    return Hooks(settings, recorder, transfer, limit, metrics, lambda: get_serving().weight_version)
