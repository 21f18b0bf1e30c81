"""Client of the MLflow registry, shared by all processes.

Import MLflow names from this module only: MLflow reads its environment variables on import, and this module sets them
first.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

# MLflow decides on import whether it sends telemetry. Aurora reports to its operator only.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow decides on import whether it configures logging. The process does that itself.
os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")

import mlflow
from mlflow import environment_variables as mlflow_settings
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from requests import RequestException

from schemas.settings import Registry

__all__ = [
    "FAILURES",
    "PREFIX",
    "Dataset",
    "DatasetInput",
    "InputTag",
    "Metric",
    "MlflowException",
    "Param",
    "connect",
    "delete_artifacts",
    "download",
    "download_model",
    "is_not_found",
    "model_name",
]

PREFIX = "aurora."
"""Prefix of the names of registered models; the line follows."""
FAILURES = (MlflowException, RequestException, OSError)
"""Exceptions of a call that the registry rejects or does not answer."""

_NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def is_not_found(error: Exception) -> bool:
    """Return whether a call failed because the model, version or alias does not exist."""
    return isinstance(error, MlflowException) and error.error_code in _NOT_FOUND


def model_name(line: str) -> str:
    """Return the name of the registered model of a speculator line."""
    return PREFIX + line


def connect(settings: Registry) -> MlflowClient:
    """Return a client that gives up after ``registry.timeout``.

    MLflow reads limits and credentials from environment variables only. Its default is seven attempts of two minutes
    each. Every caller here retries by itself and must not block for a quarter of an hour.
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
    """Download the files of a version into a folder below the given one and return its path."""
    return _download(client, uri, model_name(line), version, folder)


def download_model(settings: Registry, named: str, folder: Path) -> Path:
    """Download the files of a registered model of any name into a folder below the given one and return its path.

    Args:
        settings: The registry.
        named: ``NAME@ALIAS`` or ``NAME/VERSION``.
        folder: Where the files are written.

    Raises:
        ValueError: the name has another form.
    """
    client, (name, at, alias) = connect(settings), named.partition("@")
    name, slash, version = (name, "/", "") if at else named.rpartition("/")
    if not name or not slash or not (alias if at else version):
        raise ValueError("expected models:/NAME@ALIAS or models:/NAME/VERSION")
    if at:
        version = client.get_model_version_by_alias(name, alias).version
    return _download(client, settings.tracking_uri, name, version, folder)


def delete_artifacts(client: MlflowClient, uri: str, name: str, version: str) -> None:
    """Delete the files of a version of a registered model; do nothing if they are deleted."""
    source = client.get_model_version_download_uri(name, version)
    get_artifact_repository(source, tracking_uri=uri, registry_uri=uri).delete_artifacts()


def _download(client: MlflowClient, uri: str, name: str, version: str, folder: Path) -> Path:
    source = client.get_model_version_download_uri(name, version)
    return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=uri))
