"""Version cache: downloads each version from the registry once, checks it, and rejects a defective one for good.

A cached draft is float32, 40 MB for SmolLM2-135M with 8,192 draft tokens. Drafts stay in the cache while a canary is
served in time slices, and are dropped otherwise: the engine holds its own copy of the active one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Container
from pathlib import Path

import structlog

from schemas.events import AUDITED_TAG
from schemas.registry_client import FAILURES, connect, download, is_not_found, model_name
from schemas.settings import Registry
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from schemas.status import RejectedVersionStatus
from serving.engines.base import HotSwapEngine
from serving.versions.alias_policy import RegistryAnswer, parse_answer

log = structlog.get_logger()


class RegistryError(RuntimeError):
    """The registry is unreachable or fails; another try may succeed."""


class UnknownVersionError(RegistryError):
    """The line has no such version."""


class RejectedVersionError(RuntimeError):
    """The version is defective; this node does not serve it."""


class MlflowRegistry:
    """Versions of one speculator line, registered as model ``aurora.<line>``."""

    def __init__(self, settings: Registry, line: str) -> None:
        self._uri, self._line = settings.tracking_uri, line
        self._client = connect(settings)

    def read_aliases(self) -> RegistryAnswer:
        """Return the aliases of the line and its audit state; no aliases if the model does not exist.

        Raises:
            RegistryError: the registry is unreachable.
        """
        try:
            model = self._client.get_registered_model(model_name(self._line))
        except FAILURES as error:
            if is_not_found(error):
                return RegistryAnswer({})
            raise self._failure(error) from error
        aliases = {alias: str(version) for alias, version in model.aliases.items()}
        return parse_answer(aliases, model.tags.get(AUDITED_TAG))

    def has_version(self, version: str) -> bool:
        """Return whether the line has this version.

        Raises:
            RegistryError: the registry is unreachable.
        """
        try:
            self._client.get_model_version(model_name(self._line), version)
        except FAILURES as error:
            if is_not_found(error):
                return False
            raise self._failure(error) from error
        return True

    def download(self, version: str, folder: Path) -> Path:
        """Download the files of a version; return their folder, below the given one.

        Raises:
            RegistryError: a file cannot be downloaded.
        """
        try:
            return download(self._client, self._uri, self._line, version, folder)
        except FAILURES as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> RegistryError:
        return RegistryError(f"registry.tracking_uri {self._uri}, model {model_name(self._line)}: {error}")


class VersionCache:
    """Checked drafts by version, and the versions that were rejected."""

    def __init__(self, registry: MlflowRegistry, engine: HotSwapEngine) -> None:
        self._registry = registry
        self._engine = engine
        self._drafts: dict[str, EagleDraft] = {}
        self._rejected: dict[str, RejectedVersionStatus] = {}

    @property
    def rejected(self) -> tuple[RejectedVersionStatus, ...]:
        """Versions that this node does not serve."""
        return tuple(self._rejected.copy().values())

    def is_rejected(self, version: str) -> bool:
        """Return whether the version was rejected."""
        return version in self._rejected

    def is_cached(self, version: str | None) -> bool:
        """Return whether the version is in the cache."""
        return version in self._drafts

    def draft(self, version: str) -> EagleDraft:
        """Return the draft of a cached version."""
        return self._drafts[version]

    def fetch(self, version: str) -> None:
        """Download and check a version unless it is cached.

        Raises:
            RejectedVersionError: the version is defective.
            RegistryError: the version cannot be downloaded.
        """
        if version not in self._drafts and version not in self._rejected:
            self._download(version)
        if version in self._rejected:
            raise RejectedVersionError(f"version {version} is rejected: {self._rejected[version].why}")

    def retain(self, versions: Container[str | None]) -> None:
        """Drop all other drafts."""
        for version in [version for version in self._drafts if version not in versions]:
            del self._drafts[version]

    def _download(self, version: str) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="aurora-version-") as folder:
                draft = checkpoint.read_checkpoint(self._registry.download(version, Path(folder)), self._engine.line)
            self._engine.check(draft)
        except CheckpointError as error:
            log.warning("version_rejected", version=version, why=str(error))
            self._rejected[version] = RejectedVersionStatus(version=version, time=time.time(), why=str(error))
        else:
            self._drafts[version] = draft
