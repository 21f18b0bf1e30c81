"""How the Faust consumer reads ``kafka.client``, which is written in librdkafka's names.

Understood: ``security.protocol``, ``sasl.mechanism`` (PLAIN, SCRAM-SHA-256, SCRAM-SHA-512) with ``sasl.username`` and
``sasl.password``, ``ssl.ca.location``, ``ssl.certificate.location``, ``ssl.key.location`` and ``ssl.key.password``.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping

import faust
from faust.types.auth import CredentialsT

_UNDERSTOOD = frozenset(
    {
        "security.protocol",
        "sasl.mechanism",
        "sasl.mechanisms",
        "sasl.username",
        "sasl.password",
        "ssl.ca.location",
        "ssl.certificate.location",
        "ssl.key.location",
        "ssl.key.password",
    }
)


def ignored(client: Mapping[str, str]) -> list[str]:
    """Options that other Kafka clients take and the consumer does not."""
    return sorted(set(client) - _UNDERSTOOD)


def credentials(client: Mapping[str, str]) -> CredentialsT | None:
    """The consumer's credentials; None for a plain connection.

    Raises:
        ValueError: ``security.protocol`` is none of Kafka's.
    """
    protocol = client.get("security.protocol", "PLAINTEXT").upper()
    if protocol not in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"):
        raise ValueError(f"kafka.client: security.protocol {protocol!r} is not a protocol of Kafka")
    if protocol == "PLAINTEXT":
        return None
    context = _context(client) if protocol.endswith("SSL") else None
    if not protocol.startswith("SASL"):
        return faust.SSLCredentials(context)
    return faust.SASLCredentials(
        username=client.get("sasl.username"),
        password=client.get("sasl.password"),
        mechanism=client.get("sasl.mechanism") or client.get("sasl.mechanisms") or "PLAIN",
        ssl_context=context,
    )


def _context(client: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=client.get("ssl.ca.location"))
    certificate = client.get("ssl.certificate.location")
    if certificate is not None:
        context.load_cert_chain(certificate, client.get("ssl.key.location"), client.get("ssl.key.password"))
    return context
