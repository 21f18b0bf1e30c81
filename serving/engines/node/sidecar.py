"""Sidecar of a server: its first draft, the version poller, and the operator's endpoints of a node."""

from __future__ import annotations

import shutil
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from schemas.settings import Settings, SettingsError
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.day_0_draft import SpeculatorLine, read_line
from schemas.speculator.network import EagleDraft
from schemas.telemetry.metrics import register_process_metrics
from serving.engines.node.command_line import DraftFolder
from serving.engines.node.server_client import ServerClient, ServerError
from serving.engines.node.server_engine import ServerEngine
from serving.http import admin, status, webhook
from serving.http.server import BackgroundServer, Drain, bind
from serving.versions.alias_policy import FollowedAliases, apply_answer
from serving.versions.cache import MlflowRegistry, RegistryError
from serving.versions.poller import VersionPoller

log = structlog.get_logger()

_READY_POLL_S = 0.2
_JOIN_S = 2.0


def read_target_line(settings: Settings) -> SpeculatorLine:
    """Return the speculator line of the node's target.

    Raises:
        SettingsError: no draft can be made for the target.
    """
    try:
        return read_line(settings.target, settings.speculator)
    except CheckpointError as error:
        raise SettingsError(f"target.path {settings.target.path}: {error}") from error


def write_first_draft(
    settings: Settings, line: SpeculatorLine, registry: MlflowRegistry, draft_dir: str
) -> tuple[DraftFolder, EagleDraft]:
    """Write the draft that a server starts with: the version that the alias names, or the day-0 draft.

    Raises:
        SettingsError: it cannot be written below ``draft_dir``, a setting of the engine's section.
    """
    version, draft = _read_alias(settings, line, registry) or (settings.speculator.day_0, line.day_0_draft)
    # One folder per node: a server that starts again must not find older versions.
    folder = Path(draft_dir).absolute() / settings.serve.node
    try:
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint.write_checkpoint(draft, folder, line.target, line=line.name)
    except OSError as error:
        raise SettingsError(f"draft_dir {draft_dir}: the draft cannot be written: {error}") from error
    log.info("first_draft_written", version=version, line=line.name, folder=str(folder))
    return DraftFolder(folder, version), draft


class Sidecar:
    """Polls versions for the server, and answers the operator's endpoints, on threads.

    Raises:
        SettingsError: the address is taken.
    """

    def __init__(
        self, settings: Settings, server: ServerClient, engine: ServerEngine, registry: MlflowRegistry
    ) -> None:
        serve = settings.serve
        self._server, self._engine, self._stack = server, engine, ExitStack()
        sockets = [self._stack.enter_context(bind(serve.host, serve.port))]
        if serve.admin_port:
            sockets.append(self._stack.enter_context(bind(serve.admin_host, serve.admin_port, "serve.admin_")))
        self._poller = VersionPoller(registry, engine, settings) if serve.speculate else None
        self._stopping, self._is_polling = threading.Event(), False
        self.drain = Drain()
        app, metrics = admin.create_app(serve), CollectorRegistry()
        register_process_metrics(metrics)
        reports = status.Reports(engine, self._poller)
        status.add_routes(app, serve.node, engine, engine, metrics, reports, self.drain)
        webhook.add_route(app, serve.webhook_secret, engine.line, self._poller)
        admin_app = admin.create_app(serve) if serve.admin_port else app
        admin.add_routes(admin_app, serve, engine, self._poller)
        for own, server_socket in zip((app, admin_app), sockets, strict=False):
            self._stack.callback(BackgroundServer(own, server_socket, "sidecar-http").close)
        self._starting = threading.Thread(target=self._start_polling, name="sidecar-start", daemon=True)
        self._starting.start()

    def close(self) -> None:
        """Stop all of it; a thread that hangs ends with the process."""
        self._stopping.set()
        self._starting.join(_JOIN_S)
        if self._poller and self._is_polling:
            self._poller.stop()
        self._engine.stop()
        self._stack.close()
        self._server.close()

    def _start_polling(self) -> None:
        """Wait until the server answers, then poll versions; on a thread, so that a hanging server delays no signal."""
        why = ""
        while not self._stopping.wait(_READY_POLL_S):
            if not self._server.is_healthy():
                continue
            try:
                self._engine.start()
            except ServerError as error:
                # The server serves in any case. The start is retried, and each reason logged once.
                if str(error) != why:
                    log.warning("server_engine_start_failed", why=str(error))
                why = str(error)
                continue
            if self._poller:
                self._poller.start()
                self._is_polling = True
            log.info("server_ready")
            return


def _read_alias(settings: Settings, line: SpeculatorLine, registry: MlflowRegistry) -> tuple[str, EagleDraft] | None:
    """Return the version that the alias names; None if there is none yet, so that the poller brings it later."""
    alias = settings.serve.alias
    try:
        followed = apply_answer(FollowedAliases(), registry.read_aliases(), alias, canary=False, anchor=False)
        version = followed.main.version if followed else None
        if version is None:
            return None
        with tempfile.TemporaryDirectory(prefix="aurora-version-") as folder:
            return version, checkpoint.read_checkpoint(registry.download(version, Path(folder)), line.name)
    except (RegistryError, CheckpointError) as error:
        log.warning("first_draft_is_day_0", alias=alias, why=str(error))
        return None
