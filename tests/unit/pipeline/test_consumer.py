"""``kafka.client_options`` as the stream's consumer reads it: what it takes, what it leaves, and what it refuses."""

from __future__ import annotations

import ssl

import pytest

from pipeline.consumer import build_credentials, find_ignored_options
from schemas.settings import SettingsError

PASSWORD = {"sasl.username": "aurora", "sasl.password": "geheim"}


def test_without_options_the_connection_is_plain() -> None:
    assert build_credentials({}) is None
    assert build_credentials({"security.protocol": "plaintext"}) is None


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("name", ["sasl.mechanism", "sasl.mechanisms"])
def test_passwords_are_taken_with_every_mechanism(name: str, mechanism: str) -> None:
    taken = build_credentials({"security.protocol": "SASL_PLAINTEXT", name: mechanism, **PASSWORD})
    assert (taken.username, taken.password, taken.mechanism.value) == ("aurora", "geheim", mechanism)
    assert taken.ssl_context is None


def test_tls_checks_the_name_unless_it_is_told_not_to() -> None:
    strict = build_credentials({"security.protocol": "SSL"}).context
    assert (strict.check_hostname, strict.verify_mode) == (True, ssl.CERT_REQUIRED)
    any_name = build_credentials({"security.protocol": "SSL", "ssl.endpoint.identification.algorithm": "none"}).context
    assert (any_name.check_hostname, any_name.verify_mode) == (False, ssl.CERT_REQUIRED)
    blind = build_credentials({"security.protocol": "SSL", "enable.ssl.certificate.verification": "false"}).context
    assert (blind.check_hostname, blind.verify_mode) == (False, ssl.CERT_NONE)


@pytest.mark.parametrize(
    ("client", "told"),
    [
        ({"security.protocol": "TLS"}, "security.protocol 'TLS'"),
        ({"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"}, "sasl.mechanism 'OAUTHBEARER'"),
        ({"security.protocol": "SSL", "ssl.ca.location": "/nowhere.pem"}, r"ssl\.ca\.location /nowhere\.pem"),
        ({"security.protocol": "SSL", "ssl.ca.pem": "no certificate"}, "kafka.client_options"),
    ],
)
def test_what_cannot_be_used_is_an_error_with_the_setting(client: dict[str, str], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        build_credentials(client)


def test_options_of_other_clients_are_left_but_not_those_of_the_way_in() -> None:
    assert find_ignored_options({"security.protocol": "SSL", "socket.timeout.ms": "1"}) == ["socket.timeout.ms"]
    with pytest.raises(
        SettingsError, match=r"kafka\.client_options: ssl\.certificate\.pem: .*ssl\.certificate\.location"
    ):
        find_ignored_options({"security.protocol": "SSL", "ssl.certificate.pem": "-"})
