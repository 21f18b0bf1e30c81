"""The way to the broker for everything but the stream itself: reached, or a clear word on why not."""

from __future__ import annotations

import time
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from schemas.errors import UserError
from schemas.settings import Kafka, SettingsError

TIMEOUT_S = 15.0
_ASK_S = 2.0
_NOT_LET_IN = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL})


class TopicError(UserError):
    """A topic that cannot be reached, created or used; the message names the setting to change."""


def client(settings: Kafka, **options: Any) -> dict[str, Any]:
    """Configuration of a client that says nothing on its own."""
    return {
        **settings.client_options,
        "bootstrap.servers": settings.bootstrap_servers,
        "log_level": 0,
        "reconnect.backoff.max.ms": 1000,
        **options,
    }


class Refusals:
    """Hears the errors of a client, and keeps the last that says that the broker does not let it in."""

    def __init__(self) -> None:
        self.last: str | None = None

    def __call__(self, error: KafkaError) -> None:
        """An ``error_cb``."""
        if error.code() in _NOT_LET_IN:
            self.last = error.str()


def connect(settings: Kafka, timeout_s: float = TIMEOUT_S) -> AdminClient:
    """A client that the broker has answered. Keep it while its calls run.

    Raises:
        TopicError: it does not answer, or does not let the client in.
        SettingsError: ``kafka.client_options`` has an option that the client does not know.
    """
    refusals = Refusals()
    try:
        admin = AdminClient(client(settings, error_cb=refusals))
    except (KafkaException, ValueError) as error:
        raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            admin.list_topics(timeout=min(_ASK_S, timeout_s))
        except KafkaException as error:
            admin.poll(0)
            if refusals.last:
                raise TopicError(
                    f"the broker at {settings.bootstrap_servers} does not let this client in: {refusals.last}; check "
                    f"kafka.client_options"
                ) from error
            if time.monotonic() > deadline:
                raise TopicError(
                    f"no broker answered at {settings.bootstrap_servers} within {timeout_s:g} s "
                    f"({error.args[0].str()}): "
                    "start one, or point kafka.bootstrap_servers at the one you have "
                    "(kafka.client_options for SASL and TLS)"
                ) from error
        else:
            return admin
