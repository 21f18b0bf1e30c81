"""The Helm chart, rendered by Helm."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "ops" / "deploy" / "helm" / "aurora-stream"
HELM = shutil.which("helm") or shutil.which("helm", path=str(Path(sys.executable).parent))
NAMESPACE = "prod"

Values = Mapping[str, Any]
Objects = list[dict[str, Any]]

needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not installed: make helm")

SERVICES: Values = {
    "kafka": {"bootstrapServers": "kafka:9092"},
    "mlflow": {"trackingUri": "http://mlflow:5000"},
    "s3": {"tables": "s3://aurora/tables"},
}
"""What every installation has to say."""


def merge(values: Values, over: Values) -> dict[str, Any]:
    """Return the values with those of ``over`` in their place, as Helm merges files."""
    merged = copy.deepcopy(dict(values))
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged


def run_helm(command: list[str], values: Values | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm, with the values on its input if there are any."""
    assert HELM is not None
    given = [] if values is None else ["--values", "-"]
    return subprocess.run(
        [HELM, *command, *given], input=json.dumps(values), capture_output=True, text=True, check=False, timeout=60
    )


def render(values: Values, chart: Path = CHART, release: str = "aurora") -> Objects:
    """Return the objects of a release."""
    return copy.deepcopy(_render(json.dumps(values), chart, release))


@cache
def _render(values: str, chart: Path, release: str) -> Objects:
    command = ["template", release, str(chart), "--namespace", NAMESPACE]
    run = run_helm(command, json.loads(values))
    assert run.returncode == 0, run.stderr
    return [one for one in yaml.safe_load_all(run.stdout) if one]


def named(objects: Objects, kind: str, name: str) -> dict[str, Any]:
    """Return the object of a kind and a name."""
    (found,) = (one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, name))
    return found


def pod_specs(objects: Objects) -> dict[str, dict[str, Any]]:
    """Return the specifications of all pods, by component."""
    found = {}
    for one in objects:
        spec = one.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template is not None:
            found[template["metadata"]["labels"]["app.kubernetes.io/component"]] = template["spec"]
    return found


def container(objects: Objects, component: str) -> dict[str, Any]:
    """Return the only container of a component."""
    (found,) = pod_specs(objects)[component]["containers"]
    return dict(found)


def settings_file(objects: Objects) -> str:
    """Return the content of aurora.toml."""
    return str(named(objects, "ConfigMap", "aurora")["data"]["aurora.toml"])
