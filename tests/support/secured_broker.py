"""A real broker with TLS: one listener requires a password, the other a client certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives import serialization

from ops.local.kafka import Broker
from schemas.settings import Kafka

USER, PASSWORD = "aurora", "geheim-42"
_JAAS = "org.apache.kafka.common.security"


@dataclass(frozen=True)
class Secured:
    """Addresses and certificates of the broker, and complete ``kafka`` settings for each kind of client."""

    folder: Path
    password_port: int
    certificate_port: int

    @property
    def ca(self) -> str:
        return str(self.folder / "ca.pem")

    def by_password(self, mechanism: str, password: str = PASSWORD) -> Kafka:
        client = {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": mechanism,
            "sasl.username": USER,
            "sasl.password": password,
            "ssl.ca.location": self.ca,
        }
        return Kafka(bootstrap_servers=f"127.0.0.1:{self.password_port}", client_options=client)

    def by_certificate(self) -> Kafka:
        client = {
            "security.protocol": "SSL",
            "ssl.ca.location": self.ca,
            "ssl.certificate.location": str(self.folder / "client.pem"),
            "ssl.key.location": str(self.folder / "client.pem"),
        }
        return Kafka(bootstrap_servers=f"127.0.0.1:{self.certificate_port}", client_options=client)


@contextmanager
def secured_broker(folder: Path, free_port: Callable[[], int]) -> Iterator[Secured]:
    """Start the broker with new certificates, and create its user."""
    open_port, controller_port = free_port(), free_port()
    made = Secured(folder, free_port(), free_port())
    ca = trustme.CA()
    ca.cert_pem.write_to_path(made.ca)
    for name, identity in {"server": "127.0.0.1", "client": "aurora@example.org"}.items():
        (folder / f"{name}.pem").write_bytes(_key_and_chain(ca.issue_cert(identity)))
    server = Broker(
        folder / "broker", open_port, controller_port, properties=_properties(made, open_port, controller_port)
    )
    server.start()
    try:
        admin = AdminClient({"bootstrap.servers": server.bootstrap})
        scram = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
        upsertion = UserScramCredentialUpsertion(USER, scram, PASSWORD.encode())
        admin.alter_user_scram_credentials([upsertion])[USER].result(20)
        yield made
    finally:
        server.stop()


def _properties(made: Secured, open_port: int, controller_port: int) -> dict[str, object]:
    listeners = {
        "PLAINTEXT": open_port,
        "SASL_SSL": made.password_port,
        "SSL": made.certificate_port,
    }
    addresses = ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items())
    return {
        "listeners": f"{addresses},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": addresses,
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT," + ",".join(f"{name}:{name}" for name in listeners),
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256",
        "listener.name.sasl_ssl.plain.sasl.jaas.config": (
            f'{_JAAS}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
        ),
        "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": f"{_JAAS}.scram.ScramLoginModule required;",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": made.folder / "server.pem",
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": made.ca,
        "listener.name.ssl.ssl.client.auth": "required",
    }


def _key_and_chain(cert: trustme.LeafCert) -> bytes:
    """Return key and chain for one file. Kafka reads keys in PKCS 8 only."""
    key = serialization.load_pem_private_key(cert.private_key_pem.bytes(), None)
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    chain = b"".join(blob.bytes() for blob in cert.cert_chain_pems)
    return key.private_bytes(serialization.Encoding.PEM, *form) + chain
