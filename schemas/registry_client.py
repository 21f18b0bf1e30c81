"""How every process reaches the MLflow registry: one client, one name for each line's model.

Whatever is needed of MLflow comes from here: it reads its variables when it is imported, and they are set first.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

# Aurora reports to nobody but its operator, and MLflow decides on its telemetry while it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# So is who writes its log: this process, in its own form.
os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")

import mlflow
from mlflow import environment_variables as mlflow_settings
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from requests import RequestException

from schemas.settings import Registry

__all__ = [
    "FAILURES",
    "PREFIX",
    "Metric",
    "MlflowException",
    "Param",
    "connect",
    "download",
    "is_absent",
    "model_name",
]

PREFIX = "aurora."
"""Before the line, in the name of its registered model."""
FAILURES = (MlflowException, RequestException, OSError)
"""What a call raises when the registry is away or refuses."""

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def is_absent(error: Exception) -> bool:
    """Whether a call failed because there is no such model, version or alias."""
    return isinstance(error, MlflowException) and error.error_code in _ABSENT


def model_name(line: str) -> str:
    """Name of the registered model of a speculator line."""
    return PREFIX + line


def connect(settings: Registry) -> MlflowClient:
    """A client that gives up after ``registry.timeout``.

    MLflow takes its limits and credentials from its own variables only. By default it tries seven times, two minutes
    each; everything here asks again anyway, and must not stand still for a quarter of an hour.
    """
    mlflow_settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
    mlflow_settings.MLFLOW_HTTP_REQUEST_TIMEOUT.set(math.ceil(settings.timeout))
    if settings.username:
        mlflow_settings.MLFLOW_TRACKING_USERNAME.set(settings.username)
        mlflow_settings.MLFLOW_TRACKING_PASSWORD.set(settings.password.get_secret_value())
    mlflow_settings.MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    mlflow_settings.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    return MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)


def download(client: MlflowClient, uri: str, line: str, version: str, folder: Path) -> Path:
    """A version's files, in a folder below the given one."""
    # Not by `models:/name/version`: MLflow would add a file of its own, which the checkpoint contract refuses.
    source = client.get_model_version_download_uri(model_name(line), version)
    return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=uri))
