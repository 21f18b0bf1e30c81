"""Settings of every process: ``aurora.toml``, then ``AURORA_*`` variables, then flags; nothing else reads them.

One file serves all processes, each reads its sections, and every section is checked whichever process starts, so that
a typing error is found at once::

    [kafka]                                      AURORA_KAFKA__BOOTSTRAP_SERVERS=kafka:9092
    bootstrap = "kafka:9092"

An unknown key is an error that names the nearest known one.
"""

from schemas.settings.loading import SettingsError, load, to_environ
from schemas.settings.sections import (
    DAY_0,
    Canary,
    Device,
    Drift,
    Duration,
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
)

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
    "load",
    "to_environ",
]
