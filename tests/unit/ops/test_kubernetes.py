"""The manifests are valid for Kubernetes and KEDA, and agree with docker-compose.yml."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from schemas.settings import load

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "ops" / "deploy" / "kubernetes"
OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
PROCESSES = ("stream", "train", "promoter", "serve")


def documents(*names: str) -> Iterator[dict[str, Any]]:
    for name in names or sorted(path.name for path in FOLDER.glob("*.yaml")):
        yield from yaml.safe_load_all((FOLDER / name).read_text())


def named(kind: str, name: str) -> dict[str, Any]:
    return next(one for one in documents() if (one["kind"], one["metadata"]["name"]) == (kind, name))


WORKLOADS = {one["metadata"]["name"]: one for one in documents() if one["kind"] in ("Deployment", "StatefulSet")}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    text = re.sub(r"\$\{\w+(?::[-?][^}]*)?\}", "x", (ROOT / "docker-compose.yml").read_text())
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return services


def pod(name: str) -> dict[str, Any]:
    found: dict[str, Any] = WORKLOADS[name]["spec"]["template"]["spec"]
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = pod(name)["containers"]
    return dict(found)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_valid_for_kubernetes(version: str) -> None:
    ours = [one for one in documents() if not one["apiVersion"].startswith("keda.sh/")]
    assert len(ours) > 10
    for one in ours:
        kubernetes_validate.validate(one, version, strict=True)


def test_the_scaled_object_is_valid_for_keda_and_wrong_ones_are_not() -> None:
    schema = json.loads((ROOT / "tests" / "support" / "keda_scaled_object.json").read_text())
    scaled = named("ScaledObject", "stream")
    strict = closed(schema)
    jsonschema.validate(scaled, strict)
    for wrong in (
        {"scaleTargetRef": {}},
        {"maxReplicaCount": "8"},
        {"maxReplicas": 8},
        {"triggers": [{"type": "kafka"}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**scaled, "spec": {**scaled["spec"], **wrong}}, strict)


def closed(schema: Any) -> Any:
    """Return the schema with unknown fields as errors; a Kubernetes server prunes them. Free metadata stays open."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    return {**made, "additionalProperties": False} if isinstance(schema.get("properties"), dict) else made


def test_keda_scales_by_the_lag_of_the_configured_group_and_topic() -> None:
    spec, defaults = named("ScaledObject", "stream")["spec"], load(environ={})
    (trigger,) = spec["triggers"]
    settings = named("ConfigMap", "aurora")["data"]
    assert trigger["type"] == "kafka"
    assert trigger["metadata"]["topic"] == defaults.kafka.traces_topic
    assert trigger["metadata"]["consumerGroup"] == defaults.stream.group_id
    assert trigger["metadata"]["bootstrapServers"] == settings["AURORA_KAFKA__BOOTSTRAP_SERVERS"]
    assert spec["maxReplicaCount"] == int(settings["AURORA_KAFKA__PARTITIONS"])
    assert spec["scaleTargetRef"]["name"] == "stream"
    assert "replicas" not in WORKLOADS["stream"]["spec"]


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_runs_as_compose_runs_it(compose: dict[str, Any], name: str) -> None:
    service, one = compose[name], container(name)
    assert one["args"] == service["command"]
    assert one["image"].split(":")[0] == service["image"]
    probe = service["healthcheck"]["test"][1:]
    probes = [
        one[kind]["exec"]["command"] for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in one
    ]
    assert all(command[:-1] == probe[:-1] for command in probes)
    assert probe in probes, "the check of compose is among them"
    port = int(re.search(r":(\d+)/", probe[-1])[1])  # type: ignore[index]
    assert [listed["containerPort"] for listed in one["ports"]] == [port]
    ours = {variable["name"] for variable in one["env"]}
    there = {key for key in service["environment"] if key.startswith(f"AURORA_{name.upper()}__")}
    assert there - {"AURORA_SERVE__ADMIN_TOKEN", "AURORA_PROMOTER__ADMIN_TOKEN"} <= ours


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_runs_unprivileged_and_writes_only_to_its_volumes(name: str) -> None:
    of_pod, one = pod(name), container(name)
    assert of_pod["securityContext"]["runAsNonRoot"]
    assert of_pod["securityContext"]["runAsUser"] == 10001
    assert of_pod["automountServiceAccountToken"] is False
    locked = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert one["securityContext"] == locked
    writable = {mount["mountPath"] for mount in one["volumeMounts"] if not mount.get("readOnly")}
    assert writable <= {"/tmp", "/var/lib/aurora"}
    assert {"requests", "limits"} <= one["resources"].keys()


@pytest.mark.parametrize("name", PROCESSES)
def test_its_environment_holds_valid_settings(name: str) -> None:
    environ = dict(named("ConfigMap", "aurora")["data"])
    environ |= {key: value or "" for key, value in named("Secret", "aurora")["stringData"].items()}
    environ |= {one["name"]: one.get("value", "a-pod") for one in container(name)["env"]}
    settings = load(environ=environ)
    grace = pod(name)["terminationGracePeriodSeconds"]
    assert name != "serve" or grace >= settings.serve.drain_delay + settings.serve.drain_timeout + 7


def test_no_secret_is_in_a_file() -> None:
    for one in documents():
        for value in one.get("stringData", {}).values():
            texts = json.loads(value).values() if value.startswith("{") else [value]
            assert not any(texts), one["metadata"]["name"]
