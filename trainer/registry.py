"""Speculator versions in MLflow: a registered model per line, versions with tags, and the aliases that name them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import environment_variables as mlflow_settings
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from requests import RequestException

from schemas.events import Alias
from schemas.settings import Registry as RegistrySettings

PREFIX = "aurora."
_ARTIFACT = "speculator"
_PAGE = 200


class RegistryError(RuntimeError):
    """The registry cannot be reached, or refused; another try may go well."""


@dataclass(frozen=True, slots=True)
class Line:
    """A registered model: the line that it stands for, and the version that each alias names."""

    name: str
    aliases: Mapping[str, str]


class SpeculatorRegistry:
    """Versions of all lines. Every call raises ``RegistryError`` where the registry does not do what was asked."""

    def __init__(self, settings: RegistrySettings) -> None:
        # MLflow takes these from its own variables only. By default it tries seven times, two minutes each; the loops
        # that call this ask again anyway, and must not stand still for a quarter of an hour.
        mlflow_settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
        mlflow_settings.MLFLOW_HTTP_REQUEST_TIMEOUT.set(math.ceil(settings.timeout_s))
        self._uri = settings.uri
        self._client = MlflowClient(tracking_uri=settings.uri, registry_uri=settings.uri)

    def lines(self) -> list[Line]:
        """All lines, the one that changed last at the end."""
        with self._calls():
            models = []
            token: str | None = None
            while token != "":
                page = self._client.search_registered_models(f"name LIKE '{PREFIX}%'", _PAGE, page_token=token)
                models += list(page)
                token = page.token or ""
            models.sort(key=lambda model: model.last_updated_timestamp)
            return [Line(model.name.removeprefix(PREFIX), _aliases(model.aliases)) for model in models]

    def aliases(self, line: str) -> dict[str, str]:
        """Version that each alias of a line names; empty where the line is not registered yet."""
        with self._calls():
            try:
                return _aliases(self._client.get_registered_model(PREFIX + line).aliases)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return {}
                raise

    def tags(self, line: str, version: str) -> dict[str, str]:
        """Tags of a version."""
        with self._calls():
            return dict(self._client.get_model_version(PREFIX + line, version).tags)

    def register(self, line: str, folder: Path, tags: Mapping[str, str], metrics: Mapping[str, float]) -> str:
        """Upload a checkpoint folder as the line's next version, and return its number."""
        model = PREFIX + line
        with self._calls():
            try:
                self._client.create_registered_model(model, tags={"line": line})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = self._client.get_experiment_by_name(model)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(model)
            run = self._client.create_run(experiment_id).info.run_id
            for name, value in metrics.items():
                self._client.log_metric(run, name, value)
            self._client.log_artifacts(run, str(folder), _ARTIFACT)
            version = self._client.create_model_version(model, f"runs:/{run}/{_ARTIFACT}", run, tags=dict(tags))
            self._client.set_terminated(run)
            return str(version.version)

    def point(self, line: str, alias: Alias, version: str) -> None:
        """Make an alias name a version."""
        with self._calls():
            self._client.set_registered_model_alias(PREFIX + line, alias, version)

    def download(self, line: str, version: str, folder: Path) -> Path:
        """The version's files, in a folder below the given one."""
        with self._calls():
            # Not by `models:/name/version`: MLflow would add a file of its own, which the checkpoint contract refuses.
            source = self._client.get_model_version_download_uri(PREFIX + line, version)
            return Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=self._uri))

    @contextmanager
    def _calls(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, RequestException, OSError) as error:
            raise RegistryError(f"registry.uri {self._uri}: {error}") from error


def _aliases(named: Mapping[str, object]) -> dict[str, str]:
    return {alias: str(version) for alias, version in named.items()}
