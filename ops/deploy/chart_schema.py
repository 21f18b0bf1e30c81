"""The schema of the Helm chart's values, with the settings: ``python -m ops.deploy.chart_schema`` writes it.

Helm checks values against it before it renders anything, and names the wrong one. A test compares the file with what
this module builds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BeforeValidator, SecretStr
from pydantic.fields import FieldInfo

from schemas.settings import Settings
from schemas.settings.types import DURATION, parse_duration

Schema = dict[str, Any]

FILE = Path(__file__).parent / "helm" / "aurora-stream" / "values.schema.json"
OTHER_VALUES = {
    "kafka.bootstrap_servers",  # kafka.bootstrapServers
    "registry.tracking_uri",  # mlflow.trackingUri
    "tables.uri",  # s3.tables
    "serve.engine",
    "serve.node",  # the pod's name
    "stream.static_member",  # the pod's name
}
"""Settings that other values of the chart determine."""
_BOUNDS = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength")
_UNSAFE_OPTION = "(?i)(secret|password|passphrase|token|authorization|access_key|account_key)"
"""Names of options that a Secret holds, not a value."""

_TEXT: Schema = {"type": "string"}
_NAMED: Schema = {"type": "string", "minLength": 1}
_FLAG: Schema = {"type": "boolean"}
_QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}
_TEXTS: Schema = {"type": "object", "additionalProperties": _TEXT}
_LIST: Schema = {"type": "array"}
_ANY: Schema = {"type": "object"}
_OBJECTS: Schema = {"type": "array", "items": _ANY}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}


def build() -> str:
    """Return the content of the file."""
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **_object(_values())}
    return json.dumps(schema, indent=1) + "\n"


def _values() -> Schema:
    autoscaling = {"minReplicas": _count(1)}
    return {
        "global": _ANY,
        "fullnameOverride": _TEXT,
        "images": _object(
            {
                "registry": _TEXT,
                "tag": _TEXT,
                "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
                "pullSecrets": {"type": "array", "items": _NAMED},
                **dict.fromkeys(("learning", "builtin", "sglang", "vllm"), _NAMED),
            }
        ),
        "settings": _settings(),
        "kafka": _object(
            {
                "bootstrapServers": _NAMED,
                "sasl": _object(
                    {
                        "mechanism": {"enum": ["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]},
                        **_secrets("serve", "stream", "train", "promoter", "topics"),
                        "usernameKey": _TEXT,
                        "passwordKey": _NAMED,
                    }
                ),
                "tls": _object(
                    {
                        "enabled": _FLAG,
                        "caSecret": _TEXT,
                        "clientSecret": _TEXT,
                        **dict.fromkeys(("caKey", "certificateKey", "privateKeyKey"), _NAMED),
                    }
                ),
            }
        ),
        "mlflow": _object(
            {
                "trackingUri": {"type": "string", "pattern": "^https?://"},
                **_secrets("serve", "train", "promoter"),
                "usernameKey": _NAMED,
                "passwordKey": _NAMED,
            }
        ),
        "s3": _object(
            {
                "tables": {"type": "string", "pattern": "^[a-z0-9]+://."},
                "region": _TEXT,
                "endpoint": {"type": "string", "pattern": "^(https?://.*)?$"},
                **_secrets("serve", "stream", "train", "promoter", "maintenance"),
                "accessKeyIdKey": _NAMED,
                "secretAccessKeyKey": _NAMED,
            }
        ),
        "models": _object({"claim": _TEXT, "volume": _ANY, "target": _NAMED}),
        "env": _TEXTS,
        "podSecurityContext": _ANY,
        "serve": _process(
            engine={"enum": ["builtin", "sglang", "vllm"]},
            flags={"type": "array", "items": _TEXT},
            replicas=_count(0),
            gpus={"type": ["integer", "null"], "minimum": 0},
            gpuResource=_NAMED,
            sharedMemory=_QUANTITY,
            startupSeconds=_count(5),
            rollingUpdate=_ANY,
            adminSecret=_TEXT,
            apiKeysSecret=_TEXT,
            service=_object(
                {
                    "type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                    "port": _PORT,
                    "annotations": _TEXTS,
                }
            ),
            autoscaling=_object(
                {
                    "mode": {"enum": ["none", "hpa", "keda"]},
                    **autoscaling,
                    "maxReplicas": _count(1),
                    "waitingRequestsPerNode": _count(1),
                    "runningRequestsPerNode": _count(1),
                    "prometheus": {"type": "string", "pattern": "^https?://"},
                }
            ),
        ),
        "stream": _process(
            replicas=_count(0),
            autoscaling=_object(
                {
                    "mode": {"enum": ["none", "keda"]},
                    **autoscaling,
                    "lagPerWorker": _count(1),
                    "authentication": _TEXT,
                }
            ),
        ),
        "train": _process(
            gpus=_count(0),
            gpuResource=_NAMED,
            storage=_object({"size": _QUANTITY, "className": _TEXT}),
            spill=_object({"size": _QUANTITY}),
        ),
        "promoter": _process(adminSecret=_TEXT),
        "maintenance": _process(schedule=_NAMED),
        "topics": _process(),
        "networkPolicy": _object({"enabled": _FLAG, "clients": _OBJECTS, "monitoring": _OBJECTS}),
        "monitoring": _object(
            {
                name: _object({"enabled": _FLAG, "labels": _TEXTS})
                for name in ("podMonitor", "prometheusRule", "dashboards")
            }
        ),
    }


def _process(**properties: Schema) -> Schema:
    """Return the schema of a process: its own values beside those of every process."""
    resources = {"type": "object", "additionalProperties": {"type": ["string", "integer", "number"]}}
    shared = {
        "enabled": _FLAG,
        "resources": _object({"requests": resources, "limits": resources}),
        "nodeSelector": _TEXTS,
        "tolerations": _OBJECTS,
        "affinity": _ANY,
        "priorityClassName": _TEXT,
        "podAnnotations": _TEXTS,
        "podLabels": _TEXTS,
        "serviceAccountAnnotations": _TEXTS,
        "extraEnv": _OBJECTS,
        "extraVolumes": _OBJECTS,
        "extraVolumeMounts": _OBJECTS,
    }
    return _object(shared | properties)


def _object(properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _count(minimum: int) -> Schema:
    return {"type": "integer", "minimum": minimum}


def _secrets(*processes: str) -> Schema:
    """Return the names of Secrets: of all processes, and of single ones."""
    return {"secret": _TEXT, "secrets": _object(dict.fromkeys(processes, _TEXT))}


def _settings() -> Schema:
    """Return the schema of the settings. Secrets have no place in it: they come from Secrets."""
    models = Settings.model_json_schema()["$defs"]
    sections = {}
    for section, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type)
        generated = models[field.annotation.__name__]["properties"]
        sections[section] = _object(
            {
                key: _setting(info, generated[key])
                for key, info in field.annotation.model_fields.items()
                if info.annotation is not SecretStr and f"{section}.{key}" not in OTHER_VALUES
            }
        )
    return _object(sections)


def _setting(info: FieldInfo, generated: Schema) -> Schema:
    schema = {name: generated[name] for name in _BOUNDS if name in generated}
    if "additionalProperties" in generated:
        return {**_TEXTS, "patternProperties": {_UNSAFE_OPTION: False}}
    if "anyOf" in generated:
        return {"type": ["number", "string"]}
    if any(isinstance(part, BeforeValidator) and part.func is parse_duration for part in info.metadata):
        return {**schema, "type": ["number", "string"], "pattern": rf"^\s*{DURATION.pattern}\s*$"}
    return schema


if __name__ == "__main__":
    FILE.write_text(build())
