"""MLflow with accounts: only permitted users change the version that nodes load."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import environment_variables as mlflow_settings
from pydantic import SecretStr
from tiny_draft import SHAPE

from ops.local.mlflow_server import server_command
from ops.local.process import Process
from ops.observe.doctor.checks import CheckContext, Finding
from ops.observe.doctor.services import check_registry
from schemas.registry_client import connect
from schemas.settings import Registry, Settings
from schemas.speculator import checkpoint
from schemas.speculator.network import random_draft
from serving.versions.cache import MlflowRegistry
from serving.versions.cache import RegistryError as NodeRegistryError
from trainer.release.registry import RegistryError, SpeculatorRegistry, TrainingTable

ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "a password of twelve and more"


@dataclass
class Accounts:
    """An MLflow server with the accounts of the documentation."""

    uri: str

    def settings(self, user: str, password: str = PASSWORD) -> Registry:
        return Registry(tracking_uri=self.uri, username=user, password=SecretStr(password))

    def admin(self, path: str, **body: Any) -> httpx.Response:
        answer = httpx.post(f"{self.uri}/api/{path}", json=body, auth=("admin", PASSWORD), timeout=30)
        answer.raise_for_status()
        return answer


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Accounts]:
    folder, port = tmp_path_factory.mktemp("accounts"), free_port()
    config = (ROOT / "ops/deploy/registry/basic_auth.ini").read_text()
    (folder / "basic_auth.ini").write_text(config.replace("/var/lib/mlflow", str(folder)))
    environ = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": uuid.uuid4().hex,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [*server_command(folder, port), "--app-name", "basic-auth"]
    server = Process("registry", command, folder / "registry.log", environ)
    made = Accounts(f"http://127.0.0.1:{port}")
    server.start()
    try:
        server.wait_ready(lambda: answers(f"{made.uri}/health"), 180)
        for user in ("node", "trainer", "promoter"):
            made.admin("2.0/mlflow/users/create", username=user, password=PASSWORD)
        yield made
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def own_credentials() -> Iterator[None]:
    """Remove the credentials, which MLflow keeps for the whole process."""
    yield
    mlflow_settings.MLFLOW_TRACKING_USERNAME.unset()
    mlflow_settings.MLFLOW_TRACKING_PASSWORD.unset()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_trainer_registers_the_promoter_moves_aliases_and_a_node_only_reads(
    accounts: Accounts, tmp_path: Path
) -> None:
    line = checkpoint.write_checkpoint(random_draft(SHAPE, 1), tmp_path / "draft", uuid.uuid4().hex).line
    trainer = SpeculatorRegistry(accounts.settings("trainer"))
    version = trainer.register(line, tmp_path / "draft", {"line": line}, {})
    trainer.set_alias(line, "candidate", version)

    promoter = SpeculatorRegistry(accounts.settings("promoter"))
    with pytest.raises(RegistryError, match=r"(?i)permission denied"):
        promoter.set_alias(line, "champion", version)
    of_model = {"resource_type": "registered_model", "resource_id": f"aurora.{line}"}
    accounts.admin("3.0/mlflow/users/permissions/grant", username="promoter", permission="EDIT", **of_model)
    promoter.set_alias(line, "champion", version)

    node = MlflowRegistry(accounts.settings("node"), line)
    assert node.read_aliases().aliases == {"candidate": version, "champion": version}
    (tmp_path / "served").mkdir()
    assert checkpoint.read_checkpoint(node.download(version, tmp_path / "served"), line)
    as_node = SpeculatorRegistry(accounts.settings("node"))
    with pytest.raises(RegistryError, match=r"(?i)permission denied"):
        as_node.set_alias(line, "champion", version)
    with pytest.raises(RegistryError, match=r"(?i)permission denied"):
        as_node.register(line, tmp_path / "draft", {"line": line}, {})


def test_deleting_versions_needs_the_right_to_manage_model_and_experiment(accounts: Accounts, tmp_path: Path) -> None:
    line = checkpoint.write_checkpoint(random_draft(SHAPE, 1), tmp_path / "draft", uuid.uuid4().hex).line
    trainer = SpeculatorRegistry(accounts.settings("trainer"))
    table = TrainingTable("accepted", str(tmp_path), 3)
    as_trainer = [trainer.register(line, tmp_path / "draft", {}, {}, trained_on=[table]) for _ in range(2)]
    experiment = connect(accounts.settings("trainer")).get_experiment_by_name(f"aurora.{line}").experiment_id
    of_model = {"resource_type": "registered_model", "resource_id": f"aurora.{line}"}
    of_experiment = {"resource_type": "experiment", "resource_id": experiment}
    promoter = SpeculatorRegistry(accounts.settings("promoter"))
    with pytest.raises(RegistryError, match=r"(?i)permission denied"):
        promoter.delete(line, as_trainer[0])
    for resource in (of_model, of_experiment):
        accounts.admin("3.0/mlflow/users/permissions/grant", username="promoter", permission="MANAGE", **resource)
    promoter.delete(line, as_trainer[0])
    assert [version.number for version in promoter.versions(line)] == as_trainer[1:]


@pytest.mark.parametrize("user", ["", "node"])
def test_access_needs_an_account_and_its_password(accounts: Accounts, user: str) -> None:
    node = MlflowRegistry(accounts.settings(user, "wrong"), "line")
    with pytest.raises(NodeRegistryError, match="401"):
        node.read_aliases()


def test_the_doctor_names_the_setting_for_access(accounts: Accounts) -> None:
    def looked(registry: Registry) -> list[Finding]:
        return list(check_registry(CheckContext(Settings(registry=registry))))

    (finding,) = looked(Registry(tracking_uri=accounts.uri))
    assert "registry.username" in finding.fix
    assert [finding.level for finding in looked(accounts.settings("node"))] == ["ok"]
