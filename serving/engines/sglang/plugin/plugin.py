"""Entry point ``sglang.srt.plugins``: puts our hooks into SGLang's own server.

SGLang calls ``register`` in every process that it starts. Only the one that schedules ever has a step; there, and on
the first rank of a tensor-parallel group, the recorder begins with the first step. Whatever speaks against recording is
said once in the server's log, and the server goes on without it.
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

NOT_RECORDING = "aurora_not_recording"


def register() -> None:
    """Check the settings and the server, and hook what ``compat`` names."""
    structlog.configure(
        processors=[
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    settings, why = _settings()
    why = why or compatibility.refusal()
    if why:
        log.error(NOT_RECORDING, why=why)
    elif settings.traces.enabled:
        _hook(Plugin(settings))


def _settings() -> tuple[Settings, str | None]:
    """The settings, or the default ones and what is wrong."""
    try:
        return load(), None
    except SettingsError as error:
        return Settings(), str(error)


def _hook(plugin: Plugin) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook, kind in (
        (compatibility.STEP, plugin.step, HookType.BEFORE),
        (compatibility.VERIFY, plugin.verify, HookType.BEFORE),
        (compatibility.SAMPLE, plugin.sample, HookType.BEFORE),
        (compatibility.PREFILL, plugin.prefill, HookType.AFTER),
        (compatibility.JUDGE, plugin.judge, HookType.AROUND),
        (compatibility.RELEASE, plugin.release, HookType.BEFORE),
    ):
        HookRegistry.register(target, hook, kind)


def safe(hook: Hook) -> Hook:
    """The last guard between our code and the server's, for what stands before and behind the counting one."""

    @wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception:
            # What this could be is not known; that it would end the scheduler, and every request with it, is.
            log.exception("aurora_hook_failed", hook=hook.__name__)
            return None

    return run  # type: ignore[return-value]


class Plugin:
    """The hooks as SGLang calls them: they pick what is needed from its arguments.

    Nothing of ours that imports the metrics library is imported before the first step: SGLang tells that library where
    its files are only after the plugins were loaded.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._hooks: Hooks | None = None
        self._begun = False

    @safe
    def step(self, worker: Any, *_args: Any, **_kwargs: Any) -> None:
        """BEFORE a step."""
        if not self._begun:
            self._begun = True
            self._hooks = _begin(self._settings, worker)
        if self._hooks:
            self._hooks.step()

    @safe
    def verify(self, *_args: Any, **_kwargs: Any) -> None:
        """BEFORE the target verifies."""
        if self._hooks:
            self._hooks.drafted()

    @safe
    def sample(self, runner: Any, logits_output: Any, *_args: Any, **_kwargs: Any) -> None:
        """BEFORE the target's next token is chosen."""
        if self._hooks and not runner.is_draft_worker:
            self._hooks.sampling(logits_output)

    @safe
    def prefill(self, result: Any, _worker: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
        """AFTER prompts were read."""
        if self._hooks:
            self._hooks.prefilled(result, batch)

    def judge(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """AROUND the decision: the scores before it, what was accepted after it."""
        judging = self._judging(*args, **kwargs)
        result = original(*args, **kwargs)
        self._judged(judging, result, *args, **kwargs)
        return result

    @safe
    def release(self, req: Any, *_args: Any, **_kwargs: Any) -> None:
        """BEFORE a request's memory is given back."""
        if self._hooks:
            self._hooks.released(req)

    @safe
    def _judging(self, verify_input: Any, batch: Any, logits_output: Any, *_args: Any, **_kwargs: Any) -> Any:
        if not self._begun:
            self._begun = True
            log.error(NOT_RECORDING, why=compatibility.OTHER_WORKER)
        return self._hooks.judging(verify_input, batch, logits_output) if self._hooks else None

    @safe
    def _judged(
        self, judging: Any, result: Any, verify_input: Any, batch: Any, logits_output: Any, *_args: Any, **_kwargs: Any
    ) -> None:
        if self._hooks and judging:
            self._hooks.judged(judging, verify_input, batch, logits_output, result)


def _begin(settings: Settings, worker: Any) -> Hooks | None:
    """Start to record, unless this process is not the one to do it, or something speaks against it."""
    try:
        return _started(settings, worker)
    except SettingsError as error:
        why = str(error)
    except Exception:
        # The server must live, whatever of ours is broken; it is said once, since it is tried once.
        log.exception(NOT_RECORDING)
        return None
    log.error(NOT_RECORDING, why=why)
    return None


def _started(settings: Settings, worker: Any) -> Hooks | None:
    import torch
    from sglang.srt.runtime_context import get_parallel, get_serving

    from serving.engines.sglang.plugin.cost import CostGate
    from serving.engines.sglang.plugin.hooks import Hooks
    from serving.engines.sglang.plugin.metrics import Figures
    from serving.engines.sglang.plugin.origin import origin_of
    from serving.engines.sglang.plugin.recorder import Recorder
    from serving.engines.sglang.plugin.transfer import Carrier
    from serving.traces.publisher import TracePublisher

    parallel, arguments, device = get_parallel(), worker.server_args, torch.device(worker.device)
    if parallel.attn_tp_rank != 0:
        return None
    if why := compatibility.unsuitable(
        device.type, parallel.pp_size, is_eagle3=worker.speculative_algorithm.is_eagle3()
    ):
        log.error(NOT_RECORDING, why=why)
        return None
    carrier, gate, figures = Carrier(device), CostGate(settings.sglang.max_capture_ratio), Figures()
    width = 3 * worker.target_worker.model_runner.model_config.hidden_size

    def origin() -> Any:
        return origin_of(settings.serve.node, arguments.model_path, arguments.speculative_draft_model_path, width)

    recorder = Recorder(TracePublisher(settings.kafka, settings.traces), origin, gate, figures)
    atexit.register(recorder.close)
    return Hooks(settings, recorder, carrier, gate, figures, lambda: get_serving().weight_version)
