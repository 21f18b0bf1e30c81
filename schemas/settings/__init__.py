"""Settings of all processes, from ``aurora.toml``, then ``AURORA_*`` variables, then flags. Nothing else reads these.

One file configures all processes. Each process reads its own sections but validates every section, so that an error is
found at once::

    [kafka]                                      AURORA_KAFKA__BOOTSTRAP_SERVERS=kafka:9092
    bootstrap_servers = "kafka:9092"

An unknown key is an error that names the nearest known key.
"""

from schemas.settings.loading import SettingsError, load, to_environ
from schemas.settings.sections import (
    DAY_0,
    Canary,
    Device,
    Drift,
    Kafka,
    Objective,
    Promoter,
    Registry,
    Serve,
    Settings,
    Sglang,
    Speculator,
    Stack,
    Stream,
    Tables,
    Target,
    Telemetry,
    Traces,
    Train,
    Update,
    Vllm,
)
from schemas.settings.types import Duration

__all__ = [
    "DAY_0",
    "Canary",
    "Device",
    "Drift",
    "Duration",
    "Kafka",
    "Objective",
    "Promoter",
    "Registry",
    "Serve",
    "Settings",
    "SettingsError",
    "Sglang",
    "Speculator",
    "Stack",
    "Stream",
    "Tables",
    "Target",
    "Telemetry",
    "Traces",
    "Train",
    "Update",
    "Vllm",
    "load",
    "to_environ",
]
