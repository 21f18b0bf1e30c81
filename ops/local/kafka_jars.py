"""The class path of the embedded broker: Apache Kafka's own jars, each checked against a recorded hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ops.local.locks import held
from schemas.errors import UserError

ENDPOINT = "org.apache.kafka:kafka_2.13:4.4.0+org.slf4j:slf4j-simple:1.7.36"
LOCK = Path(__file__).with_name("kafka.lock")
"""``sha256  file name`` of every jar, as ``sha256sum`` writes it."""
CACHE = Path.home() / ".cache" / "aurora" / "jars"


class JarsError(UserError):
    """The jars could not be fetched, or are not those that were recorded."""


def class_path() -> list[Path]:
    """The broker's jars, fetched on first use (about 20 s) and cached for every checkout of this user.

    Raises:
        JarsError: no network on first use, or a jar differs from its recorded hash.
    """
    with held(CACHE.with_suffix(".lock")):
        jars = _fetch()
    verify(jars, recorded())
    return jars


def recorded() -> dict[str, str]:
    """File name to SHA-256 of every jar the broker needs."""
    return {name: digest for digest, name in (line.split() for line in LOCK.read_text().splitlines())}


def verify(jars: list[Path], expected: dict[str, str]) -> None:
    """Compare the jars with the record.

    Raises:
        JarsError: a jar is missing, unknown or altered.
    """
    found = {jar.name: hashlib.sha256(jar.read_bytes()).hexdigest() for jar in jars}
    if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        raise JarsError(
            f"the embedded broker's jars differ from {LOCK.name} in {', '.join(wrong)}; delete {CACHE} to fetch anew"
        )


def _fetch() -> list[Path]:
    import jgo

    try:
        return list(jgo.build(ENDPOINT, cache_dir=CACHE).all_jars)
    except Exception as error:  # jgo documents no errors: whatever it raises, the jars are not there
        raise JarsError(
            f"cannot fetch the embedded broker's jars ({ENDPOINT}): {error}; check the network, "
            "or set kafka.bootstrap_servers to a broker of your own"
        ) from error
