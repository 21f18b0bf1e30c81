"""The processes of ``docker-compose.yml`` become healthy with its commands, environments and health checks.

Services of the test session replace the containers of other projects.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from ops.bench.object_store import ObjectStore
from schemas.settings import load
from serving.engines.sglang.node.flags import PORT, Flags, check
from serving.engines.sglang.plugin import compatibility

ROOT = Path(__file__).resolve().parents[2]
PORTS = {"stream": 16066, "train": 16067, "promoter": 16068, "serve": 8000}
CHOSEN = {
    "POSTGRES_PASSWORD": "a",
    "STORE_KEY": "b",
    "STORE_SECRET": "c",
    "GRAFANA_PASSWORD": "d",
    "TARGET": "smollm2-135m-instruct",
    "SGLANG_FLAGS": "--tp-size 2",
}


def substitute(text: str, variables: dict[str, str]) -> str:
    """Return the file with its variables substituted as compose does."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match["name"], match["kind"], match["rest"] or ""
        if name in variables:
            return variables[name]
        assert kind == ":-", f"{name} has no value: {rest}"
        return rest

    return re.sub(r"\$\{(?P<name>\w+)(?P<kind>:[-?])?(?P<rest>[^}]*)\}", value, text)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    compose = yaml.safe_load(substitute((ROOT / "docker-compose.yml").read_text(), CHOSEN))
    found: dict[str, Any] = compose["services"]
    return found


def test_every_secret_must_be_set_and_the_example_names_it() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    needed = set(re.findall(r"\$\{(\w+):\?", text))
    example = dict(line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if "=" in line[:40])
    assert needed == {"POSTGRES_PASSWORD", "STORE_KEY", "STORE_SECRET", "GRAFANA_PASSWORD"}
    assert {example[name] for name in needed} == {""}
    assert set(re.findall(r"\$\{(\w+)", text)) <= example.keys()


def test_every_service_is_pinned_health_checked_and_memory_limited(services: dict[str, Any]) -> None:
    for name, service in services.items():
        image = service["image"]
        assert "build" in service or re.search(r":v?\d", image), name
        assert name == "bucket" or {"healthcheck", "mem_limit"} <= service.keys(), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
    ours = [service for service in services.values() if "build" in service]
    assert len(ours) == 6
    for service in ours:
        assert service["read_only"]
        assert service["user"] != "0:0"


def test_the_engines_replace_each_other(services: dict[str, Any]) -> None:
    built_in, sglang = services["serve"], services["serving-sglang"]
    assert (built_in["profiles"], sglang["profiles"]) == (["builtin"], ["sglang"])
    assert "serve" in sglang["networks"]["default"]["aliases"], "Prometheus scrapes the node under that name"
    assert set(built_in["ports"]) < set(sglang["ports"])
    (device,) = sglang["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_the_sglang_image_has_a_supported_version_and_a_valid_command(services: dict[str, Any]) -> None:
    service = services["serving-sglang"]
    base = re.search(r"^FROM (\S+):v(\S+)$", (ROOT / service["build"]["dockerfile"]).read_text(), re.MULTILINE)
    assert base is not None
    assert base[2] in compatibility.SIGNATURES
    command, _, given = service["command"].partition(" -- ")
    settings = load(environ={name: str(value or "") for name, value in service["environment"].items()})
    server_flags = Flags(tuple(given.split()))
    check(server_flags, settings)
    assert (command, server_flags.url(PORT)) == ("serve --engine sglang", "http://127.0.0.1:30000")


def test_start_is_ordered_by_health(services: dict[str, Any]) -> None:
    waits = {name: service.get("depends_on", {}) for name, service in services.items()}
    assert waits["stream"]["kafka"] == {"condition": "service_healthy"}
    assert waits["train"]["mlflow"] == {"condition": "service_healthy"}
    assert all(condition["condition"] != "service_started" for wait in waits.values() for condition in wait.values())


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="docker compose is not installed",
)
@pytest.mark.parametrize(
    ("profiles", "engine"),
    [("builtin", "serve"), ("builtin,alerts", "serve"), ("sglang", "serving-sglang")],
)
def test_docker_compose_accepts_the_file(tmp_path: Path, profiles: str, engine: str) -> None:
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in CHOSEN.items()))
    command = ["docker", "compose", "--project-directory", str(ROOT), "--env-file", str(tmp_path / "env")]
    environ = {**os.environ, "COMPOSE_PROFILES": profiles}
    run = subprocess.run(
        [*command, "config", "--format", "json"], capture_output=True, text=True, check=False, env=environ
    )
    assert run.returncode == 0, run.stderr
    services = json.loads(run.stdout)["services"]
    assert {"serve", "serving-sglang"} & services.keys() == {engine}


@pytest.mark.timeout(300)
def test_every_process_becomes_healthy_as_the_file_starts_it(
    services: dict[str, Any],
    broker: str,
    registry: str,
    object_store: ObjectStore,
    smollm2: Path,
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    ports = {name: free_port() for name in PORTS}
    here = {
        "AURORA_KAFKA__BOOTSTRAP_SERVERS": broker,
        "AURORA_KAFKA__TRACES_TOPIC": f"traces-{uuid.uuid4().hex[:8]}",
        "AURORA_REGISTRY__TRACKING_URI": registry,
        "AURORA_TABLES__URI": f"{object_store.bucket}/{uuid.uuid4().hex}",
        "AURORA_TABLES__STORAGE_OPTIONS": json.dumps(object_store.options()),
        "AURORA_TARGET__PATH": str(smollm2),
    }
    wanted = json.loads(services["stream"]["environment"]["AURORA_TABLES__STORAGE_OPTIONS"])
    assert wanted.keys() == object_store.options().keys(), "the test's store needs the same options"
    running: dict[str, subprocess.Popen[bytes]] = {}
    with terminating(running):
        for name, port in ports.items():
            environ = {
                key: str(value).replace("/var/lib/aurora", str(tmp_path / name)).replace("0.0.0.0", "127.0.0.1")
                for key, value in services[name]["environment"].items()
            }
            environ |= here | {f"AURORA_{name.upper()}__PORT": str(port)}
            with (tmp_path / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    [sys.executable, "-m", "ops.cli.main", *services[name]["command"]],
                    env={**os.environ, **environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                    cwd=tmp_path,
                    stdout=log,
                    stderr=log,
                )
        checks = {
            name: [part.replace(f":{PORTS[name]}/", f":{port}/") for part in services[name]["healthcheck"]["test"]]
            for name, port in ports.items()
        }
        deadline = time.monotonic() + 200
        while unhealthy := {name: why for name, check in checks.items() if (why := run_check(check))}:
            for name, process in running.items():
                assert process.poll() is None, (tmp_path / f"{name}.log").read_text()
            assert time.monotonic() < deadline, unhealthy
            time.sleep(1)


def run_check(check: list[str]) -> str:
    """Run a health check; return its error, or an empty string."""
    kind, program, *arguments = check
    assert (kind, program) == ("CMD", "python")
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else run.stderr or str(run.returncode)


@contextmanager
def terminating(running: dict[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait(60)
