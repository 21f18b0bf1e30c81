"""What a server begins with: the version that the alias names, or the draft of day 0."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import structlog

from schemas.settings import Settings, SettingsError
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.initial_draft import Line, read_line
from schemas.speculator.network import EagleDraft
from serving.engines.sglang.node.flags import Start
from serving.engines.sglang.node.remote_engine import Known
from serving.engines.sglang.node.weights import sent
from serving.versions.alias_policy import Following, hear
from serving.versions.cache import Registry, RegistryError

log = structlog.get_logger()


def line_of(settings: Settings) -> Line:
    """The line that a node serves.

    Raises:
        SettingsError: no draft can be made for the target.
    """
    folder = Path(settings.target.path)
    try:
        return read_line(folder, settings.speculator)
    except CheckpointError as error:
        raise SettingsError(f"target.path {folder}: {error}") from error


def begin(settings: Settings, line: Line, registry: Registry) -> tuple[Start, Known]:
    """Write the draft that SGLang starts with.

    Raises:
        SettingsError: it cannot be written.
    """
    version, draft = _champion(settings, line, registry) or (settings.speculator.day_0, line.day_0)
    # One folder: a server that starts again finds no versions of old.
    folder = Path(settings.sglang.draft_dir).absolute() / settings.serve.node
    try:
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint.write(draft, folder, line.target)
    except OSError as error:
        raise SettingsError(f"sglang.draft_dir: the draft cannot be written: {error}") from error
    log.info("sglang_begins_with", version=version, line=line.name, folder=str(folder))
    return Start(folder, version), Known(version, sent(draft))


def _champion(settings: Settings, line: Line, registry: Registry) -> tuple[str, EagleDraft] | None:
    """What the alias names now; without it a server begins at day 0, and the puller brings the rest."""
    alias = settings.serve.alias
    try:
        heard = hear(Following(), registry.named(), alias, canary=False)
        version = heard.main.version if heard else None
        if version is None:
            return None
        with tempfile.TemporaryDirectory(prefix="aurora-version-") as folder:
            return version, checkpoint.read(registry.download(version, Path(folder)), line.name)
    except (RegistryError, CheckpointError) as error:
        log.warning("sglang_begins_at_day_0", alias=alias, why=str(error))
        return None
