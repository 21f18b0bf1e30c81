"""The MLflow registry as the puller sees it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from schemas.events import AUDITED_TAG, AuditState
from schemas.registry_client import FAILURES, connect, download, is_not_found, model_name
from schemas.settings import Registry as RegistrySettings
from serving.versions.alias_policy import Named
from serving.versions.cache import RegistryError


class MlflowRegistry:
    """Versions of one speculator line, registered as model ``aurora.<line>``."""

    def __init__(self, settings: RegistrySettings, line: str) -> None:
        self._uri, self._line = settings.tracking_uri, line
        self._client = connect(settings)

    def named(self) -> Named:
        """What the aliases of the line name, and what the record says of them; nothing where there is no such model.

        Raises:
            RegistryError: no answer.
        """
        try:
            model = self._client.get_registered_model(model_name(self._line))
        except FAILURES as error:
            if is_not_found(error):
                return Named({})
            raise self._away(error) from error
        return named_of({alias: str(version) for alias, version in model.aliases.items()}, model.tags.get(AUDITED_TAG))

    def has(self, version: str) -> bool:
        """Whether the line has this version.

        Raises:
            RegistryError: no answer.
        """
        try:
            self._client.get_model_version(model_name(self._line), version)
        except FAILURES as error:
            if is_not_found(error):
                return False
            raise self._away(error) from error
        return True

    def download(self, version: str, folder: Path) -> Path:
        """The version's files, in a folder below the given one.

        Raises:
            RegistryError: not everything could be fetched.
        """
        try:
            return download(self._client, self._uri, self._line, version, folder)
        except FAILURES as error:
            raise self._away(error) from error

    def _away(self, error: Exception) -> RegistryError:
        return RegistryError(f"registry.tracking_uri {self._uri}, model {model_name(self._line)}: {error}")


def named_of(aliases: Mapping[str, str], tag: str | None) -> Named:
    """An answer of the registry; a tag that is no audit is left out and told."""
    if tag is None:
        return Named(aliases)
    try:
        audited = AuditState.model_validate_json(tag)
    except ValidationError as error:
        return Named(aliases, unreadable=f"tag {AUDITED_TAG}: {error.errors()[0]['msg']}")
    if not all(version.isdecimal() for version in audited.aliases.values()):
        return Named(aliases, unreadable=f"tag {AUDITED_TAG}: versions are numbers")
    return Named(aliases, audited)
