"""The MLflow registry as the puller sees it."""

from __future__ import annotations

import math
import os
from pathlib import Path

from requests import RequestException

# A node reports to nobody but its operator, and MLflow decides on its telemetry while it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow import environment_variables as mlflow_settings
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from schemas.settings import Registry as RegistrySettings
from serving.puller import RegistryError

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class MlflowRegistry:
    """Versions of one speculator line, registered as model ``aurora.<line>``."""

    def __init__(self, settings: RegistrySettings, line: str) -> None:
        # MLflow takes these from its own variables only. Its defaults, seven tries of two minutes each, would keep the
        # puller on one request of a dead server for a quarter of an hour; the puller polls again anyway.
        mlflow_settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
        mlflow_settings.MLFLOW_HTTP_REQUEST_TIMEOUT.set(math.ceil(settings.timeout_s))
        mlflow_settings.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
        self._uri = settings.uri
        self._model = f"aurora.{line}"
        self._client = MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)

    def named(self, alias: str) -> str | None:
        """The version that an alias names; None where there is no such model or alias.

        Raises:
            RegistryError: no answer.
        """
        try:
            return str(self._client.get_model_version_by_alias(self._model, alias).version)
        except MlflowException as error:
            if error.error_code in _ABSENT:
                return None
            raise self._away(error) from error
        except (RequestException, OSError) as error:
            raise self._away(error) from error

    def download(self, version: str, folder: Path) -> Path:
        """The version's files, in a folder below the given one.

        Raises:
            RegistryError: not everything could be fetched.
        """
        try:
            # Not by `models:/name/version`: MLflow would add a file of its own, which the checkpoint contract refuses.
            source = self._client.get_model_version_download_uri(self._model, version)
            return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=self._uri))
        except (MlflowException, RequestException, OSError) as error:
            raise self._away(error) from error

    def _away(self, error: Exception) -> RegistryError:
        return RegistryError(f"registry.uri {self._uri}, model {self._model}: {error}")
