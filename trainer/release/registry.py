"""Speculator versions in MLflow: a registered model per line, versions with tags, and the aliases that name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    Metric,
    MlflowException,
    Param,
    connect,
    download,
    is_absent,
    model_name,
)
from schemas.settings import Registry as RegistrySettings

_ARTIFACT = "speculator"
_PAGE = 200


class RegistryError(RuntimeError):
    """The registry cannot be reached, or refused; another try may go well."""


class Point(NamedTuple):
    """One value of a curve."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class Line:
    """A registered model: the line that it stands for, and the version that each alias names."""

    name: str
    aliases: Mapping[str, str]
    audited: AuditState | None = None
    """What its tag says of the record; None where it has none, or one that cannot be read."""


@dataclass(frozen=True, slots=True)
class Version:
    """A registered version."""

    number: str
    registered: datetime
    tags: Mapping[str, str]
    card: str
    """What it is, in Markdown."""
    run: str
    """The run that holds its files."""

    @property
    def quarantined(self) -> str | None:
        """Why it must not be promoted, if so."""
        return self.tags.get(QUARANTINED_TAG)


class SpeculatorRegistry:
    """Versions of all lines. Every call raises ``RegistryError`` where the registry does not do what was asked."""

    def __init__(self, settings: RegistrySettings) -> None:
        self._uri = settings.tracking_uri
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
            return [
                Line(model.name.removeprefix(PREFIX), _aliases(model.aliases), _audited(model.tags)) for model in models
            ]

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

    def versions(self, line: str) -> list[Version]:
        """All versions of a line, oldest first; none where the line is not registered."""
        with self._calls():
            found: list[Any] = []
            token: str | None = None
            while token != "":
                page = self._client.search_model_versions(f"name = '{model_name(line)}'", _PAGE, page_token=token)
                found += list(page)
                token = page.token or ""
        return sorted(map(_version, found), key=lambda version: int(version.number))

    def version(self, line: str, number: str) -> Version | None:
        """One version; None where the line has none of that number."""
        with self._calls():
            try:
                return _version(self._client.get_model_version(model_name(line), number))
            except MlflowException as error:
                if is_absent(error):
                    return None
                raise

    def has(self, line: str, number: str) -> bool:
        """Whether a line has a version of that number."""
        return self.version(line, number) is not None

    def quarantine(self, line: str, number: str, why: str) -> None:
        """Say that a version must not be promoted."""
        with self._calls():
            self._client.set_model_version_tag(model_name(line), number, QUARANTINED_TAG, why)

    def lift_quarantine(self, line: str, number: str) -> None:
        """Let a version be promoted again."""
        with self._calls():
            self._client.delete_model_version_tag(model_name(line), number, QUARANTINED_TAG)

    def stamp(self, line: str, audited: AuditState) -> None:
        """Write what the record says of a line's aliases where nodes see it."""
        with self._calls():
            self._client.set_registered_model_tag(model_name(line), AUDITED_TAG, audited.model_dump_json())

    def register(
        self, line: str, folder: Path, tags: Mapping[str, str], metrics: Mapping[str, float], card: str = ""
    ) -> str:
        """Upload a checkpoint folder as the line's next version, described by its card, and return its number."""
        model = model_name(line)
        with self._calls():
            try:
                self._client.create_registered_model(model, tags={"line": line})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            run = self._client.create_run(self._experiment(model)).info.run_id
            for name, value in metrics.items():
                self._client.log_metric(run, name, value)
            self._client.log_artifacts(run, str(folder), _ARTIFACT)
            version = self._client.create_model_version(
                model, f"runs:/{run}/{_ARTIFACT}", run, tags=dict(tags), description=card or None
            )
            self._client.set_terminated(run)
            return str(version.version)

    def begin_run(self, line: str, tags: Mapping[str, str], parameters: Mapping[str, object]) -> str:
        """Begin a run among those of a line, for curves of a training, and return its id."""
        with self._calls():
            run: str = self._client.create_run(self._experiment(model_name(line)), tags=dict(tags)).info.run_id
            self._client.log_batch(run, params=[Param(name, str(value)) for name, value in parameters.items()])
            return run

    def log(self, run: str, points: Sequence[Point]) -> None:
        """Add points to the curves of a run."""
        with self._calls():
            self._client.log_batch(run, [Metric(p.name, p.value, p.time_ms, p.step) for p in points])

    def end_run(self, run: str) -> None:
        """Say that nothing more comes to a run."""
        with self._calls():
            self._client.set_terminated(run)

    def point(self, line: str, alias: Alias, version: str) -> None:
        """Make an alias name a version."""
        with self._calls():
            self._client.set_registered_model_alias(model_name(line), alias, version)

    def unpoint(self, line: str, alias: Alias) -> None:
        """Take an alias away; one that is not there is no error."""
        with self._calls():
            self._client.delete_registered_model_alias(model_name(line), alias)

    def download(self, line: str, version: str, folder: Path) -> Path:
        """The version's files, in a folder below the given one."""
        with self._calls():
            return download(self._client, self._uri, line, version, folder)

    def _experiment(self, model: str) -> str:
        """Where the runs of a line are; made when it is first asked for."""
        experiment = self._client.get_experiment_by_name(model)
        found: str = experiment.experiment_id if experiment else self._client.create_experiment(model)
        return found

    @contextmanager
    def _calls(self) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            raise RegistryError(f"registry.tracking_uri {self._uri}: {error}") from error


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
