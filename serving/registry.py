"""The MLflow registry as the puller sees it."""

from __future__ import annotations

from pathlib import Path

from mlflow.exceptions import MlflowException

from schemas.registry import FAILURES, connect, download, model_name
from schemas.settings import Registry as RegistrySettings
from serving.puller import RegistryError

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class MlflowRegistry:
    """Versions of one speculator line, registered as model ``aurora.<line>``."""

    def __init__(self, settings: RegistrySettings, line: str) -> None:
        self._uri, self._line = settings.uri, line
        self._client = connect(settings)

    def named(self, alias: str) -> str | None:
        """The version that an alias names; None where there is no such model or alias.

        Raises:
            RegistryError: no answer.
        """
        try:
            return str(self._client.get_model_version_by_alias(model_name(self._line), alias).version)
        except FAILURES as error:
            if _absent(error):
                return None
            raise self._away(error) from error

    def has(self, version: str) -> bool:
        """Whether the line has this version.

        Raises:
            RegistryError: no answer.
        """
        try:
            self._client.get_model_version(model_name(self._line), version)
        except FAILURES as error:
            if _absent(error):
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
        return RegistryError(f"registry.uri {self._uri}, model {model_name(self._line)}: {error}")


def _absent(error: Exception) -> bool:
    return isinstance(error, MlflowException) and error.error_code in _ABSENT
