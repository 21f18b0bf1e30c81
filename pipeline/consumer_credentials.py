"""How the Faust consumer reads ``kafka.client_options``, which is written in librdkafka's names."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any

import faust
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaError
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth
from faust.types.auth import CredentialsT

from pipeline.kafka_admin import TopicError
from schemas.settings import Kafka, SettingsError

UNDERSTOOD = frozenset(
    {
        "security.protocol",
        "sasl.mechanism",
        "sasl.mechanisms",
        "sasl.username",
        "sasl.password",
        "ssl.ca.location",
        "ssl.ca.pem",
        "ssl.certificate.location",
        "ssl.key.location",
        "ssl.key.password",
        "ssl.endpoint.identification.algorithm",
        "enable.ssl.certificate.verification",
    }
)
_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_TIMEOUT_S = 15.0


def ignored(client: Mapping[str, str]) -> list[str]:
    """Options that other Kafka clients take and the consumer does not; it works without them.

    Raises:
        SettingsError: an option that says how to get in, which the consumer would not without it.
    """
    unknown = sorted(set(client) - UNDERSTOOD)
    if needed := [name for name in unknown if name.startswith(("ssl.", "sasl."))]:
        raise SettingsError(
            f"kafka.client_options: {', '.join(needed)}: the stream's consumer does not take this; it takes "
            f"{', '.join(sorted(UNDERSTOOD))}"
        )
    return unknown


def credentials(client: Mapping[str, str]) -> CredentialsT | None:
    """The consumer's credentials; None for a plain connection.

    Raises:
        SettingsError: a protocol, a mechanism or a certificate that cannot be used.
    """
    protocol = client.get("security.protocol", "PLAINTEXT").upper()
    if protocol not in _PROTOCOLS:
        raise SettingsError(f"kafka.client_options: security.protocol {protocol!r} is none of {', '.join(_PROTOCOLS)}")
    if protocol == "PLAINTEXT":
        return None
    context = _context(client) if protocol.endswith("SSL") else None
    if not protocol.startswith("SASL"):
        return faust.SSLCredentials(context)
    mechanism = client.get("sasl.mechanism") or client.get("sasl.mechanisms") or "PLAIN"
    if mechanism not in _MECHANISMS:
        raise SettingsError(
            f"kafka.client_options: sasl.mechanism {mechanism!r}: the stream's consumer takes {', '.join(_MECHANISMS)}"
        )
    return faust.SASLCredentials(
        username=client.get("sasl.username"),
        password=client.get("sasl.password"),
        mechanism=mechanism,
        ssl_context=context,
    )


def check(kafka: Kafka) -> None:
    """Get in once as the consumer will: Faust says only that it did not.

    Raises:
        TopicError: no broker of ``kafka.bootstrap_servers`` lets the consumer in.
        SettingsError: as ``credentials``.
    """
    auth = credentials_to_aiokafka_auth(credentials(kafka.client_options), None)
    asyncio.run(_get_in(kafka.bootstrap_servers, auth))


async def _get_in(bootstrap: str, auth: Mapping[str, Any]) -> None:
    reasons = []
    for address in bootstrap.split(","):
        host, _, port = address.strip().rpartition(":")
        try:
            connection = await asyncio.wait_for(create_conn(host.strip("[]"), int(port), **auth), _TIMEOUT_S)
        except (KafkaError, OSError, ValueError) as error:
            reasons.append(f"{address.strip()}: {str(error) or type(error).__name__}")
        else:
            connection.close()
            return
    raise TopicError(
        f"no broker lets the stream's consumer in ({'; '.join(reasons)}): check kafka.client_options, "
        "and kafka.bootstrap_servers"
    )


def _context(client: Mapping[str, str]) -> ssl.SSLContext:
    certificate = client.get("ssl.certificate.location")
    try:
        context = ssl.create_default_context(cafile=client.get("ssl.ca.location"), cadata=client.get("ssl.ca.pem"))
        if certificate is not None:
            context.load_cert_chain(certificate, client.get("ssl.key.location"), client.get("ssl.key.password"))
    except (OSError, ValueError) as error:
        files = ", ".join(f"{name} {client[name]}" for name in sorted(client) if name.endswith(".location"))
        raise SettingsError(f"kafka.client_options: {error} ({files})") from error
    if client.get("ssl.endpoint.identification.algorithm") == "none":
        context.check_hostname = False
    if client.get("enable.ssl.certificate.verification") == "false":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
