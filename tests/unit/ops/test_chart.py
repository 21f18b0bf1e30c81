"""The Helm chart: its objects are valid for Kubernetes, its settings for the processes, and wrong values are errors."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_chart import (
    CHART,
    NAMESPACE,
    ROOT,
    SERVICES,
    Objects,
    Values,
    container,
    merge,
    named,
    needs_helm,
    pod_specs,
    render,
    run_helm,
    settings_file,
)

from schemas.settings import Settings, load
from serving.engines.node.command_line import Flags
from serving.engines.sglang.node import flags as sglang_flags
from serving.engines.vllm.node import vllm_flags
from serving.engines.vllm.plugin import installation

OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
FOREIGN = ("keda.sh/", "monitoring.coreos.com/")
"""Groups that are not Kubernetes' own."""
MONITORING = {name: {"enabled": True} for name in ("podMonitor", "prometheusRule", "dashboards")}
SECURED: Values = {
    "kafka": {
        "sasl": {"mechanism": "SCRAM-SHA-512", "secret": "kafka-all", "secrets": {"serve": "kafka-node"}},
        "tls": {"enabled": True, "caSecret": "kafka-ca", "clientSecret": "kafka-client"},
    },
    "mlflow": {"secrets": {"serve": "mlflow-node", "train": "mlflow-trainer", "promoter": "mlflow-promoter"}},
    "s3": {"region": "eu-central-1", "endpoint": "http://store:8333", "secret": "s3-all"},
    "images": {"registry": "registry.example.com/team", "tag": "1.2.3", "pullSecrets": ["pull"]},
    "serve": {"adminSecret": "aurora-admin", "apiKeysSecret": "aurora-keys"},
}
SETS: dict[str, Values] = {
    "builtin": {},
    "secured": merge(SECURED, {"monitoring": MONITORING, "maintenance": {"enabled": True}}),
    "sglang": {"serve": {"engine": "sglang", "flags": ["--tp-size", "2"], "gpus": 2, "autoscaling": {"mode": "keda"}}},
    "vllm": {
        "serve": {"engine": "vllm", "flags": ["--enforce-eager"], "autoscaling": {"mode": "hpa"}},
        "stream": {"autoscaling": {"mode": "keda", "authentication": "kafka"}},
        "monitoring": MONITORING,
    },
    "builtin on GPUs": {
        "serve": {"gpus": 1, "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]},
        "train": {"gpus": 1, "storage": {"className": "fast"}},
        "settings": {
            "serve": {"drain_timeout": "2m", "suffix_corpus_bytes": 33554432},
            "train": {"learning_rate": 0.0005, "batch_size": 8},
            "traces": {"features": "claim-check", "claim_check_uri": "s3://aurora/claims"},
        },
    },
    "nodes alone": {
        **{name: {"enabled": False} for name in ("stream", "train", "promoter", "topics", "networkPolicy")},
        "models": {"volume": {"csi": {"driver": "models.example.com", "readOnly": True}}},
    },
}
ALL = {name: merge(SERVICES, values) for name, values in SETS.items()}
STANDING = ("serve", "stream", "train", "promoter")

pytestmark = needs_helm
each_set = pytest.mark.parametrize("values", ALL.values(), ids=ALL)


def settings_of(objects: Objects, component: str, tmp_path: Path) -> Settings:
    """Return the settings that a process loads: from the file, and from its variables, with secrets filled in."""
    file = tmp_path / "aurora.toml"
    file.write_text(settings_file(objects))
    variables = {one["name"]: one.get("value", "from-elsewhere") for one in container(objects, component)["env"]}
    return load(file, variables)


def selected(objects: Objects, kind: str, name: str) -> dict[str, str]:
    selector = named(objects, kind, name)["spec"]["selector"]
    return dict(selector.get("matchLabels", selector))


@each_set
def test_helm_lint_accepts_the_chart(values: Values) -> None:
    run = run_helm(["lint", "--strict", str(CHART)], values)
    assert run.returncode == 0, run.stdout + run.stderr


@each_set
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_valid_for_kubernetes(values: Values, version: str) -> None:
    ours = [one for one in render(values) if not one["apiVersion"].startswith(FOREIGN)]
    assert len(ours) >= 5
    for one in ours:
        kubernetes_validate.validate(one, version, strict=True)


@each_set
def test_names_are_unique_and_in_the_namespace_of_the_release(values: Values) -> None:
    objects = render(values)
    keys = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(keys) == len(set(keys))
    assert {one["metadata"]["namespace"] for one in objects} == {NAMESPACE}


def test_a_packaged_chart_is_complete(tmp_path: Path) -> None:
    values = ALL["vllm"]
    run = run_helm(["package", str(CHART), "--destination", str(tmp_path)])
    assert run.returncode == 0, run.stderr
    (package,) = tmp_path.glob("*.tgz")
    assert render(values, package) == render(values)


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (chart["version"], chart["appVersion"]) == (project["version"], project["version"])
    assert OLDEST in chart["kubeVersion"]


# Values


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"kafka": {"bootstrapServers": ""}}, "/kafka/bootstrapServers"),
        ({"kafka": {"password": "x"}}, "'password' not allowed"),
        ({"s3": {"tables": "/tmp/tables"}}, "/s3/tables"),
        ({"mlflow": {"trackingUri": "mlflow:5000"}}, "/mlflow/trackingUri"),
        ({"serve": {"engine": "tgi"}}, "/serve/engine"),
        ({"serve": {"replicas": "two"}}, "/serve/replicas"),
        ({"serve": {"gpus": -1}}, "/serve/gpus"),
        ({"serve": {"autoscaling": {"mode": "cpu"}}}, "/serve/autoscaling/mode"),
        ({"train": {"replicas": 2}}, "'replicas' not allowed"),
        ({"train": {"storage": {"size": "20 GB"}}}, "/train/storage/size"),
        ({"settings": {"serve": {"drain_dealy": 3}}}, "'drain_dealy' not allowed"),
        ({"settings": {"serve": {"drain_delay": "soon"}}}, "/settings/serve/drain_delay"),
        ({"settings": {"kafka": {"partitions": 0}}}, "/settings/kafka/partitions"),
        ({"settings": {"serve": {"engine": "vllm"}}}, "'engine' not allowed"),
        ({"settings": {"registry": {"password": "x"}}}, "'password' not allowed"),
        ({"settings": {"kafka": {"client_options": {"sasl.password": "x"}}}}, "/client_options/sasl.password"),
        ({"settings": {"tables": {"storage_options": {"AWS_SECRET_ACCESS_KEY": "x"}}}}, "/AWS_SECRET_ACCESS_KEY"),
        ({"kafka": {"sasl": {"secret": "kafka"}}}, "kafka.sasl.mechanism"),
        ({"kafka": {"sasl": {"mechanism": "PLAIN", "secrets": {"serve": "kafka"}}}}, "kafka.sasl.secret"),
        ({"kafka": {"tls": {"caSecret": "ca"}}}, "kafka.tls.enabled"),
        ({"serve": {"flags": ["--tp-size", "2"]}}, "serve.flags"),
        ({"serve": {"engine": "vllm", "flags": ["--port=80"]}}, "serve.flags: --port=80"),
        ({"serve": {"engine": "sglang", "apiKeysSecret": "keys"}}, "serve.apiKeysSecret"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(wrong: Values, expected: str) -> None:
    run = run_helm(["template", "aurora", str(CHART)], merge(SERVICES, wrong))
    assert run.returncode != 0
    assert expected in run.stderr


# Settings


@each_set
def test_the_settings_of_every_process_are_valid(values: Values, tmp_path: Path) -> None:
    objects = render(values)
    for component in pod_specs(objects):
        settings = settings_of(objects, component, tmp_path)
        assert settings.kafka.bootstrap_servers == "kafka:9092"
        assert settings.target.path.startswith("/models/")


def test_values_override_the_settings_that_the_chart_computes_and_the_pods_follow(tmp_path: Path) -> None:
    given = {"serve": {"port": 9000, "drain_delay": "1m", "drain_timeout": "0.5h"}, "stream": {"port": 9001}}
    objects = render(merge(SERVICES, {"settings": given}))
    settings = settings_of(objects, "serve", tmp_path)
    assert (settings.serve.port, settings.serve.drain_delay, settings.serve.drain_timeout) == (9000, 60, 1800)
    assert settings.serve.host == "0.0.0.0"
    assert [port["containerPort"] for port in container(objects, "serve")["ports"]] == [9000]
    assert [port["containerPort"] for port in container(objects, "stream")["ports"]] == [9001]
    assert pod_specs(objects)["serve"]["terminationGracePeriodSeconds"] > 1860


def test_every_number_arrives_as_it_was_given(tmp_path: Path) -> None:
    settings = settings_of(render(ALL["builtin on GPUs"]), "train", tmp_path)
    assert settings.serve.suffix_corpus_bytes == 33554432
    assert (settings.train.learning_rate, settings.train.batch_size) == (0.0005, 8)


def test_credentials_come_from_the_secret_of_each_process_and_from_nowhere_else(tmp_path: Path) -> None:
    objects = render(ALL["secured"])
    assert not [one for one in objects if one["kind"] == "Secret"]

    def references(component: str) -> dict[str, tuple[str, str]]:
        found = [
            (one["name"], one.get("valueFrom", {}).get("secretKeyRef")) for one in container(objects, component)["env"]
        ]
        return {name: (ref["name"], ref["key"]) for name, ref in found if ref}

    password = "AURORA_KAFKA__CLIENT_OPTIONS__SASL.PASSWORD"
    assert references("serve") == {
        password: ("kafka-node", "password"),
        "AURORA_REGISTRY__USERNAME": ("mlflow-node", "username"),
        "AURORA_REGISTRY__PASSWORD": ("mlflow-node", "password"),
    }
    assert references("stream") == {
        password: ("kafka-all", "password"),
        "AWS_ACCESS_KEY_ID": ("s3-all", "AWS_ACCESS_KEY_ID"),
        "AWS_SECRET_ACCESS_KEY": ("s3-all", "AWS_SECRET_ACCESS_KEY"),
    }
    assert references("topics").keys() == {password}
    assert references("maintenance").keys() == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert (
        references("train").keys()
        == references("promoter").keys()
        == references("serve").keys() | references("stream").keys()
    )
    options = settings_of(objects, "serve", tmp_path).kafka.client_options
    assert options == {
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "kafka-node",
        "sasl.password": "from-elsewhere",
        "ssl.ca.location": "/etc/aurora/kafka-ca/ca.crt",
        "ssl.certificate.location": "/etc/aurora/kafka-client/user.crt",
        "ssl.key.location": "/etc/aurora/kafka-client/user.key",
    }


@each_set
def test_files_that_the_settings_name_are_mounted(values: Values, tmp_path: Path) -> None:
    objects = render(values)
    for component, pod in pod_specs(objects).items():
        settings = settings_of(objects, component, tmp_path)
        mounts = {mount["mountPath"]: mount for mount in container(objects, component)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in mounts.values()} == volumes.keys()
        named_files = [path for option, path in settings.kafka.client_options.items() if option.endswith(".location")]
        if component == "serve":
            named_files += [path for path in (settings.serve.admin_tokens_file, settings.serve.api_keys_file) if path]
            named_files.append(settings.target.path)
        for path in named_files if component != "maintenance" else ():
            assert str(Path(path).parent) in mounts, path


def test_a_change_of_the_settings_restarts_the_pods() -> None:
    def checksums(values: Values) -> set[str]:
        found = [
            one["spec"]["template"]["metadata"]["annotations"]
            for one in render(values)
            if one["kind"] in ("Deployment", "StatefulSet")
        ]
        return {annotations["checksum/settings"] for annotations in found}

    (before,) = checksums(SERVICES)
    (same,) = checksums(merge(SERVICES, {"serve": {"replicas": 5}}))
    (after,) = checksums(merge(SERVICES, {"settings": {"train": {"batch_size": 16}}}))
    assert before == same != after


# Pods


@each_set
def test_every_pod_is_restricted_and_writes_only_to_its_volumes(values: Values) -> None:
    objects = render(values)
    for component, pod in pod_specs(objects).items():
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        one = container(objects, component)
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = {mount["mountPath"] for mount in one["volumeMounts"] if not mount.get("readOnly")}
        assert writable <= {"/tmp", "/var/lib/aurora", "/var/spill", "/dev/shm"}
        assert {"requests", "limits"} <= one["resources"].keys()
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
    for account in (one for one in objects if one["kind"] == "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@each_set
def test_probes_ask_by_http_for_pages_that_the_process_has(values: Values) -> None:
    pages = {
        "serve": {"/health", "/ready"},
        "stream": {"/live", "/ready"},
        "train": {"/status"},
        "promoter": {"/status"},
    }
    objects = render(values)
    for component in pages.keys() & pod_specs(objects).keys():
        one = container(objects, component)
        probes = [one[kind] for kind in ("startupProbe", "livenessProbe", "readinessProbe") if kind in one]
        assert {probe["httpGet"]["path"] for probe in probes} == pages[component]
        assert {probe["httpGet"]["port"] for probe in probes} == {"http"}
        assert "startupProbe" in one


def test_a_process_runs_as_compose_runs_it() -> None:
    text = re.sub(r"\$\{\w+(?::[-?][^}]*)?\}", "x", (ROOT / "docker-compose.yml").read_text())
    services = yaml.safe_load(text)["services"]
    objects = render(SERVICES)
    for component in STANDING:
        service, one = services[component], container(objects, component)
        assert one["args"] == [*service["command"], "--config", "/etc/aurora/settings/aurora.toml"]
        assert one["image"].split(":")[0] == service["image"]
        port = int(re.search(r":(\d+)/", service["healthcheck"]["test"][-1])[1])  # type: ignore[index]
        assert [listed["containerPort"] for listed in one["ports"]] == [port]
    sglang = render(ALL["sglang"])
    assert container(sglang, "serve")["image"].split(":")[0] == services["serving-sglang"]["image"]


def test_an_image_has_the_tag_of_all_or_its_own() -> None:
    images = {"registry": "registry.example.com/team", "tag": "2", "builtin": "aurora-serving:1"}
    objects = render(merge(SERVICES, {"images": images}))
    assert container(objects, "serve")["image"] == "registry.example.com/team/aurora-serving:1"
    assert container(objects, "train")["image"] == "registry.example.com/team/aurora-learning:2"
    assert container(render(SERVICES), "train")["image"] == "aurora-learning:0.1.0"


# Nodes


@pytest.mark.parametrize(("engine", "port"), [("sglang", 30000), ("vllm", 8001)])
def test_a_servers_command_is_valid_for_its_engine(engine: str, port: int, tmp_path: Path) -> None:
    objects = render(ALL[engine])
    settings = settings_of(objects, "serve", tmp_path)
    one = container(objects, "serve")
    at = one["args"].index("--")
    assert one["args"][:at] == ["serve", "--config", "/etc/aurora/settings/aurora.toml"]
    given = Flags(tuple(one["args"][at + 1 :]))
    check: Callable[[Flags, Settings], None] = sglang_flags.check if engine == "sglang" else vllm_flags.check_flags
    check(given, settings)
    assert settings.serve.engine == engine
    assert given.url(0) == f"http://127.0.0.1:{port}"
    assert {listed["name"]: listed["containerPort"] for listed in one["ports"]} == {"http": 8000, "api": port}
    assert settings.serve.admin_port not in {8000, port}
    assert named(objects, "Service", "aurora-serve")["spec"]["ports"] == [
        {"name": "api", "port": 8000, "targetPort": "api"}
    ]


@pytest.mark.parametrize(("name", "gpus"), [("builtin", None), ("builtin on GPUs", 1), ("sglang", 2), ("vllm", 1)])
def test_a_node_requests_its_gpus(name: str, gpus: int | None) -> None:
    objects = render(ALL[name])
    assert container(objects, "serve")["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert "memory" in container(objects, "serve")["resources"]["limits"]


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_an_engines_image_has_a_supported_version(engine: str) -> None:
    dockerfile = (ROOT / f"ops/deploy/images/{engine}.Dockerfile").read_text()
    base = re.search(r"^FROM \S+:v(\S+)$", dockerfile, re.MULTILINE)
    assert base is not None
    supported = installation.VERSIONS if engine == "vllm" else ("0.5.21", "0.5.23")
    assert base[1] in supported
    assert f'".[{engine}-node]"' in dockerfile


@each_set
def test_a_rollout_gives_every_request_its_time(values: Values, tmp_path: Path) -> None:
    objects = render(values)
    settings, pod = settings_of(objects, "serve", tmp_path), pod_specs(objects)["serve"]
    # A server of another project is killed ten seconds after the drain.
    needed = settings.serve.drain_delay + settings.serve.drain_timeout + 10
    assert pod["terminationGracePeriodSeconds"] > needed
    assert settings.serve.drain_delay >= 10
    spec = named(objects, "Deployment", "aurora-serve")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert container(objects, "serve")["readinessProbe"]["httpGet"]["path"] == "/ready"


@each_set
def test_only_the_api_is_open_and_metrics_are_open_to_prometheus(values: Values, tmp_path: Path) -> None:
    if not values.get("networkPolicy", {}).get("enabled", True):
        assert not [one for one in render(values) if one["kind"] == "NetworkPolicy"]
        return
    objects = render(values)
    policies = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "NetworkPolicy"}
    assert policies.keys() == {"aurora", "aurora-serve"}
    engine = values.get("serve", {}).get("engine", "builtin")
    api = "http" if engine == "builtin" else "api"
    (clients,) = policies["aurora-serve"]["ingress"]
    assert clients["ports"] == [{"port": api}]
    assert clients["from"] == [{"namespaceSelector": {"matchLabels": {"aurora.clients": "true"}}}]
    page, prometheus = policies["aurora"]["ingress"]
    assert page["ports"] == [{"port": "http"}]
    (promoter,) = page["from"]
    assert promoter["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "promoter"
    assert {port["port"] for port in prometheus["ports"]} == {"http", api}
    assert prometheus["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert all(spec["policyTypes"] == ["Ingress"] for spec in policies.values())
    labels = policies["aurora"]["podSelector"]["matchLabels"].items()
    for one in objects:
        template = one.get("spec", {}).get("template", {})
        assert labels <= template.get("metadata", {}).get("labels", dict(labels)).items(), one["metadata"]["name"]
    settings = settings_of(objects, "serve", tmp_path)
    assert settings.serve.admin_host == "127.0.0.1"
    assert settings.serve.admin_port not in {port["containerPort"] for port in container(objects, "serve")["ports"]}


# Scaling and disruption


def test_nodes_scale_by_series_that_they_export() -> None:
    exported = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs/reference/metrics.md").read_text(), re.MULTILINE))
    hpa = named(render(ALL["vllm"]), "HorizontalPodAutoscaler", "aurora-serve")["spec"]
    queries = [
        trigger["metadata"]["query"]
        for trigger in named(render(ALL["sglang"]), "ScaledObject", "aurora-serve")["spec"]["triggers"]
    ]
    for name in ("aurora_serve_requests_waiting", "aurora_serve_requests_running"):
        assert name in exported
        assert name in [metric["pods"]["metric"]["name"] for metric in hpa["metrics"]]
        assert f'sum({name}{{namespace="prod", pod=~"aurora-serve-.*"}})' in queries
    assert hpa["scaleTargetRef"]["name"] == "aurora-serve"
    for name in ("vllm", "sglang"):
        assert "replicas" not in named(render(ALL[name]), "Deployment", "aurora-serve")["spec"], (
            "each upgrade would reset it"
        )
    assert named(render(ALL["builtin"]), "Deployment", "aurora-serve")["spec"]["replicas"] == 2


def test_stream_workers_scale_by_the_lag_of_the_configured_group_and_topic(tmp_path: Path) -> None:
    given = {"settings": {"kafka": {"partitions": 24, "traces_topic": "t"}, "stream": {"group_id": "g"}}}
    objects = render(merge(ALL["vllm"], given))
    spec = named(objects, "ScaledObject", "aurora-stream")["spec"]
    (trigger,) = spec["triggers"]
    settings = settings_of(objects, "stream", tmp_path)
    assert trigger["metadata"]["topic"] == settings.kafka.traces_topic == "t"
    assert trigger["metadata"]["consumerGroup"] == settings.stream.group_id == "g"
    assert trigger["metadata"]["bootstrapServers"] == settings.kafka.bootstrap_servers
    assert trigger["authenticationRef"] == {"name": "kafka"}
    assert spec["maxReplicaCount"] == settings.kafka.partitions == 24
    assert spec["scaleTargetRef"] == {"kind": "StatefulSet", "name": "aurora-stream"}
    assert "replicas" not in named(objects, "StatefulSet", "aurora-stream")["spec"]
    defaults = named(render(ALL["vllm"]), "ScaledObject", "aurora-stream")["spec"]["triggers"][0]["metadata"]
    assert (defaults["topic"], defaults["consumerGroup"]) == (Settings().kafka.traces_topic, Settings().stream.group_id)


@pytest.mark.parametrize(("name", "scaled"), [("sglang", "aurora-serve"), ("vllm", "aurora-stream")])
def test_scaled_objects_are_valid_for_keda_and_wrong_ones_are_not(name: str, scaled: str) -> None:
    schema = closed(json.loads((ROOT / "tests" / "support" / "keda_scaled_object.json").read_text()))
    one = named(render(ALL[name]), "ScaledObject", scaled)
    jsonschema.validate(one, schema)
    for wrong in ({"scaleTargetRef": {}}, {"maxReplicas": 8}, {"triggers": [{"type": "kafka"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**one, "spec": {**one["spec"], **wrong}}, schema)


def closed(schema: Any) -> Any:
    """Return the schema with unknown fields as errors; a Kubernetes server prunes them. Free metadata stays open."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    return {**made, "additionalProperties": False} if isinstance(schema.get("properties"), dict) else made


def test_a_stream_worker_is_a_static_member_named_by_its_pod(tmp_path: Path) -> None:
    objects = render(SERVICES)
    assert named(objects, "StatefulSet", "aurora-stream")["spec"]["serviceName"] == "aurora-stream"
    assert named(objects, "Service", "aurora-stream")["spec"]["clusterIP"] == "None"
    variables = {one["name"]: one.get("valueFrom") for one in container(objects, "stream")["env"]}
    assert variables["AURORA_STREAM__STATIC_MEMBER"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    settings = settings_of(objects, "stream", tmp_path)
    assert settings.stream.static_member
    # A restarted pod has to be back before its partitions are assigned to another worker.
    assert settings.stream.session_timeout > pod_specs(objects)["stream"]["terminationGracePeriodSeconds"]


@each_set
def test_replicated_processes_are_spread_and_leave_one_at_a_time(values: Values) -> None:
    objects = render(values)
    for component in {"serve", "stream"} & pod_specs(objects).keys():
        budget = named(objects, "PodDisruptionBudget", f"aurora-{component}")["spec"]
        assert budget["maxUnavailable"] == 1
        constraints = pod_specs(objects)[component]["topologySpreadConstraints"]
        assert {one["topologyKey"] for one in constraints} == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
        kind = "Deployment" if component == "serve" else "StatefulSet"
        own = selected(objects, kind, f"aurora-{component}")
        assert budget["selector"]["matchLabels"] == own
        assert selected(objects, "Service", f"aurora-{component}") == own
        assert all(one["labelSelector"]["matchLabels"] == own for one in constraints)


def test_one_trainer_ends_before_the_next_one_mounts_its_checkpoints(tmp_path: Path) -> None:
    objects = render(SERVICES)
    for name in ("train", "promoter"):
        spec = named(objects, "Deployment", f"aurora-{name}")["spec"]
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    claim = named(objects, "PersistentVolumeClaim", "aurora-train")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    volumes = {one["name"]: one for one in pod_specs(objects)["train"]["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "aurora-train"}
    settings = settings_of(objects, "train", tmp_path)
    mounts = {one["mountPath"]: one["name"] for one in container(objects, "train")["volumeMounts"]}
    assert mounts[str(Path(settings.train.checkpoint_dir).parent)] == "data"
    assert mounts[settings.train.spill_dir] == "spill"
    size = int(volumes["spill"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert size << 30 > settings.train.replay_buffer_bytes


def test_the_promoters_page_finds_the_other_processes(tmp_path: Path) -> None:
    objects = render(merge(ALL["sglang"], {"promoter": {"adminSecret": "page"}}))
    settings = settings_of(objects, "promoter", tmp_path)
    for component, section in (("serve", settings.serve), ("stream", settings.stream), ("train", settings.train)):
        service = named(objects, "Service", section.host)["spec"]
        assert service["clusterIP"] == "None"
        assert service["selector"]["app.kubernetes.io/component"] == component
        assert {"name": "http", "containerPort": section.port} in container(objects, component)["ports"]
    assert settings.promoter.host == "0.0.0.0"
    (token,) = [one for one in container(objects, "promoter")["env"] if one["name"] == "AURORA_PROMOTER__ADMIN_TOKEN"]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "page", "key": "token"}}


# Jobs


def test_topics_are_applied_before_anything_else_with_the_same_settings() -> None:
    objects = render(SERVICES)
    job, settings = named(objects, "Job", "aurora-topics"), named(objects, "ConfigMap", "aurora-topics")
    assert container(objects, "topics")["args"][:2] == ["topics", "apply"]
    hooks = [one["metadata"]["annotations"] for one in (settings, job)]
    assert {hook["helm.sh/hook"] for hook in hooks} == {"pre-install,pre-upgrade"}
    assert int(hooks[0]["helm.sh/hook-weight"]) < int(hooks[1].get("helm.sh/hook-weight", 0))
    assert settings["data"]["aurora.toml"] == settings_file(objects)
    pod = pod_specs(objects)["topics"]
    assert "serviceAccountName" not in pod, "the accounts of the release do not exist yet"
    assert pod["volumes"][0]["configMap"]["name"] == "aurora-topics"


def test_maintenance_runs_in_its_job_or_in_a_worker(tmp_path: Path) -> None:
    objects = render(ALL["secured"])
    spec = named(objects, "CronJob", "aurora-maintenance")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert container(objects, "maintenance")["args"][:2] == ["tables", "maintain"]
    assert settings_of(objects, "stream", tmp_path).tables.maintenance_interval >= 86_400
    worker_settings = settings_of(render(SERVICES), "stream", tmp_path)
    assert worker_settings.tables.maintenance_interval == Settings().tables.maintenance_interval


# Monitoring


def test_rules_and_dashboard_are_those_of_the_repository() -> None:
    objects = render(ALL["vllm"])
    folder = ROOT / "ops" / "deploy" / "monitoring"
    rules = yaml.safe_load((folder / "alerts" / "aurora.rules.yml").read_text())
    assert named(objects, "PrometheusRule", "aurora")["spec"] == rules
    dashboards = named(objects, "ConfigMap", "aurora-dashboards")
    assert json.loads(dashboards["data"]["loop.json"]) == json.loads((folder / "dashboards" / "loop.json").read_text())
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"


@pytest.mark.parametrize("name", ["secured", "vllm"])
def test_prometheus_scrapes_every_process_under_the_job_of_the_rules(name: str) -> None:
    objects = render(ALL[name])
    monitor = named(objects, "PodMonitor", "aurora")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"]["jobLabel"] == "app.kubernetes.io/component"
    endpoints = monitor["spec"]["podMetricsEndpoints"]
    server = {"port": "api", "relabelings": [{"targetLabel": "job", "replacement": name}]}
    assert endpoints == [{"port": "http"}, *([server] if name == "vllm" else [])]
    rules = (ROOT / "ops/deploy/monitoring/alerts/aurora.rules.yml").read_text()
    for component in STANDING:
        assert component in re.findall(r"[a-z]+", rules), "the rules name the job"
        assert "http" in {port["name"] for port in container(objects, component)["ports"]}
