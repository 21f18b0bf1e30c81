"""Speculator versions in MLflow: a registered model per line, versions with tags, and the aliases that name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException

from schemas.events import Alias
from schemas.registry import FAILURES, PREFIX, connect, download, model_name
from schemas.settings import Registry as RegistrySettings

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
        self._uri = settings.uri
        self._client = connect(settings)

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
                return _aliases(self._client.get_registered_model(model_name(line)).aliases)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return {}
                raise

    def tags(self, line: str, version: str) -> dict[str, str]:
        """Tags of a version."""
        with self._calls():
            return dict(self._client.get_model_version(model_name(line), version).tags)

    def register(self, line: str, folder: Path, tags: Mapping[str, str], metrics: Mapping[str, float]) -> str:
        """Upload a checkpoint folder as the line's next version, and return its number."""
        model = model_name(line)
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
            self._client.set_registered_model_alias(model_name(line), alias, version)

    def download(self, line: str, version: str, folder: Path) -> Path:
        """The version's files, in a folder below the given one."""
        with self._calls():
            return download(self._client, self._uri, line, version, folder)

    @contextmanager
    def _calls(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            raise RegistryError(f"registry.uri {self._uri}: {error}") from error


def _aliases(named: Mapping[str, object]) -> dict[str, str]:
    return {alias: str(version) for alias, version in named.items()}
