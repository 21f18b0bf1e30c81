"""Speculator versions in MLflow: a registered model for each line, its versions with tags, and their aliases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from schemas.events import AUDITED_TAG, QUARANTINED_TAG, Alias, AuditState
from schemas.registry_client import (
    FAILURES,
    PREFIX,
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    MlflowException,
    Param,
    connect,
    delete_artifacts,
    download,
    is_not_found,
    model_name,
)
from schemas.settings import Registry as RegistrySettings

_ARTIFACT, _MLMODEL = "speculator", "MLmodel"
_PAGE_SIZE = 200
_CONTEXT, _LOGGED_MODELS = "mlflow.data.context", "mlflow.log-model.history"
"""Tags from which MLflow's pages read the purpose of a dataset, and the models of a run."""


class RegistryError(RuntimeError):
    """The registry did not answer, or rejected the call; a retry may succeed."""


class MetricPoint(NamedTuple):
    """One value of a metric of a run."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class TrainingTable:
    """A Delta table up to one of its versions, from which a speculator version has learned."""

    name: str
    uri: str
    """Of the table: a folder or an address in an object store."""
    version: int

    def to_dataset(self) -> Any:
        """Return the table as a dataset in MLflow, whose own classes would need pandas."""
        source = json.dumps({"path": self.uri, "delta_table_version": self.version})
        # MLflow takes datasets of one name and digest for the same.
        digest = f"v{self.version}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        return DatasetInput(Dataset(self.name, digest, "delta_table", source), [InputTag(_CONTEXT, "training")])


@dataclass(frozen=True, slots=True)
class Line:
    """A registered model: a speculator line and its aliases."""

    name: str
    aliases: Mapping[str, str]
    """Version of each alias."""
    audited: AuditState | None = None
    """Parsed ``AUDITED_TAG``; None if the tag is missing or malformed."""


@dataclass(frozen=True, slots=True)
class Version:
    """A registered version."""

    number: str
    registered: datetime
    tags: Mapping[str, str]
    card: str
    """Description in Markdown."""
    run: str
    """MLflow run that holds its files."""

    @property
    def quarantined(self) -> str | None:
        """Why the version must not be promoted; None if it may be."""
        return self.tags.get(QUARANTINED_TAG)


class SpeculatorRegistry:
    """Versions of all lines. Every method raises ``RegistryError`` if the registry does not carry it out."""

    def __init__(self, settings: RegistrySettings) -> None:
        self._uri = settings.tracking_uri
        self._client = connect(settings)

    def lines(self) -> list[Line]:
        """Return all lines; the line that changed last is at the end."""
        models = self._read_pages(
            lambda token: self._client.search_registered_models(f"name LIKE '{PREFIX}%'", _PAGE_SIZE, page_token=token)
        )
        models.sort(key=lambda model: model.last_updated_timestamp)
        return [
            Line(model.name.removeprefix(PREFIX), _aliases(model.aliases), _audited(model.tags)) for model in models
        ]

    def aliases(self, line: str) -> dict[str, str]:
        """Return the version of each alias of a line; empty if the line is not registered yet."""
        with self._wrap_errors():
            try:
                return _aliases(self._client.get_registered_model(model_name(line)).aliases)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return {}
                raise

    def tags(self, line: str, version: str) -> dict[str, str]:
        """Return the tags of a version."""
        with self._wrap_errors():
            return dict(self._client.get_model_version(model_name(line), version).tags)

    def versions(self, line: str) -> list[Version]:
        """Return all versions of a line, oldest first; empty if the line is not registered."""
        name = f"name = '{model_name(line)}'"
        found = self._read_pages(lambda token: self._client.search_model_versions(name, _PAGE_SIZE, page_token=token))
        return sorted(map(_version, found), key=lambda version: int(version.number))

    def version(self, line: str, number: str) -> Version | None:
        """Return one version; None if the line has no such number."""
        with self._wrap_errors():
            try:
                return _version(self._client.get_model_version(model_name(line), number))
            except MlflowException as error:
                if is_not_found(error):
                    return None
                raise

    def quarantine(self, line: str, number: str, why: str) -> None:
        """Mark a version as never to be promoted again."""
        with self._wrap_errors():
            self._client.set_model_version_tag(model_name(line), number, QUARANTINED_TAG, why)

    def lift_quarantine(self, line: str, number: str) -> None:
        """Allow a version to be promoted again."""
        with self._wrap_errors():
            self._client.delete_model_version_tag(model_name(line), number, QUARANTINED_TAG)

    def write_audit_state(self, line: str, audited: AuditState) -> None:
        """Write the tag from which nodes learn the recorded aliases of a line."""
        with self._wrap_errors():
            self._client.set_registered_model_tag(model_name(line), AUDITED_TAG, audited.model_dump_json())

    def register(
        self,
        line: str,
        folder: Path,
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
        card: str = "",
        trained_on: Sequence[TrainingTable] = (),
    ) -> str:
        """Upload a checkpoint folder as the line's next version, and return its number.

        Args:
            line: Speculator line.
            folder: With the version; with ``MLmodel`` it is a model for MLflow.
            tags: Of the version.
            metrics: Of its run.
            card: Description in Markdown.
            trained_on: Tables that its run names as datasets.
        """
        model = model_name(line)
        with self._wrap_errors():
            try:
                self._client.create_registered_model(model, tags={"line": line})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            created = self._client.create_run(self._experiment(model)).info
            run = created.run_id
            for name, value in metrics.items():
                self._client.log_metric(run, name, value)
            if trained_on:
                self._client.log_inputs(run, [table.to_dataset() for table in trained_on])
            self._client.log_artifacts(run, str(folder), _ARTIFACT)
            if (folder / _MLMODEL).exists():
                self._client.set_tag(run, _LOGGED_MODELS, _describe_model(run, folder))
            # An address runs:/.. is one for clients: MLflow's pages could not read the schema there.
            source = f"{created.artifact_uri.rstrip('/')}/{_ARTIFACT}"
            version = self._client.create_model_version(model, source, run, tags=dict(tags), description=card or None)
            self._client.set_terminated(run)
            return str(version.version)

    def delete(self, line: str, version: str) -> None:
        """Delete a version and its files; if the registry stops answering meanwhile, another call completes it.

        Its run is marked as deleted, and keeps its figures until ``mlflow gc``.
        """
        name = model_name(line)
        with self._wrap_errors():
            run = self._client.get_model_version(name, version).run_id
            # The files first: without the version, nothing would lead to them.
            delete_artifacts(self._client, self._uri, name, version)
            self._client.delete_model_version(name, version)
            if run:
                self._client.delete_run(run)

    def start_run(self, line: str, tags: Mapping[str, str], parameters: Mapping[str, object]) -> str:
        """Start a run among those of a line, for the metrics of a training, and return its id."""
        with self._wrap_errors():
            run: str = self._client.create_run(self._experiment(model_name(line)), tags=dict(tags)).info.run_id
            self._client.log_batch(run, params=[Param(name, str(value)) for name, value in parameters.items()])
            return run

    def log_metrics(self, run: str, points: Sequence[MetricPoint]) -> None:
        """Add points to the metrics of a run."""
        with self._wrap_errors():
            self._client.log_batch(run, [Metric(p.name, p.value, p.time_ms, p.step) for p in points])

    def end_run(self, run: str) -> None:
        """Mark a run as finished."""
        with self._wrap_errors():
            self._client.set_terminated(run)

    def set_alias(self, line: str, alias: Alias, version: str) -> None:
        """Move an alias to a version."""
        with self._wrap_errors():
            self._client.set_registered_model_alias(model_name(line), alias, version)

    def delete_alias(self, line: str, alias: Alias) -> None:
        """Remove an alias; do nothing if it does not exist."""
        with self._wrap_errors():
            self._client.delete_registered_model_alias(model_name(line), alias)

    def download(self, line: str, version: str, folder: Path) -> Path:
        """Download the version's files and return their folder, below the given one."""
        with self._wrap_errors():
            return download(self._client, self._uri, line, version, folder)

    def _experiment(self, model: str) -> str:
        """Return the experiment with the runs of a line; create it on first use."""
        experiment = self._client.get_experiment_by_name(model)
        found: str = experiment.experiment_id if experiment else self._client.create_experiment(model)
        return found

    def _read_pages(self, search: Callable[[str | None], Any]) -> list[Any]:
        found: list[Any] = []
        token: str | None = None
        with self._wrap_errors():
            while token != "":
                page = search(token)
                found += list(page)
                token = page.token or ""
        return found

    @contextmanager
    def _wrap_errors(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            raise RegistryError(f"registry.tracking_uri {self._uri}: {error}") from error


def _describe_model(run: str, folder: Path) -> str:
    """Return the tag with which MLflow's page of a run lists its model and the flavours."""
    model = json.loads((folder / _MLMODEL).read_text())
    described = {name: model[name] for name in ("flavors", "utc_time_created", "mlflow_version")}
    return json.dumps([{"artifact_path": _ARTIFACT, "run_id": run, **described}])


def _version(found: Any) -> Version:
    return Version(
        str(found.version),
        datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        dict(found.tags),
        found.description or "",
        found.run_id or "",
    )


def _audited(tags: Mapping[str, str]) -> AuditState | None:
    try:
        return AuditState.model_validate_json(tags.get(AUDITED_TAG, ""))
    except ValidationError:
        return None


def _aliases(named: Mapping[str, object]) -> dict[str, str]:
    return {alias: str(version) for alias, version in named.items()}
