"""``POST /webhooks/registry``: the registry reports an alias move, and the node polls at once.

MLflow signs its deliveries as Standard Webhooks do: HMAC-SHA-256 over ``delivery id.time.body`` with the webhook's
secret, in the header ``x-mlflow-signature``. The node trusts nothing in the body: a delivery only makes it poll sooner.
Polling continues without deliveries, and is the path that a node relies on.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from contextlib import suppress
from typing import Any

import fastapi
from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import SecretStr

from schemas.registry_client import model_name
from serving.http.errors import ApiError
from serving.versions.poller import VersionPoller

PATH = "/webhooks/registry"
MAX_AGE_S = 300.0
"""Maximum age of a delivery by this machine's clock, so that a recorded one cannot be replayed later."""


def add_route(app: FastAPI, secret: SecretStr, line: str, poller: VersionPoller | None) -> None:
    """Add the endpoint to the application."""

    @app.post(PATH, status_code=202)
    async def receive(request: fastapi.Request) -> Response:
        """Poll the registry now: an alias of the line has moved."""
        key = secret.get_secret_value().encode()
        if not key:
            message = "The endpoint is closed: this node has no secret (set serve.webhook_secret)"
            raise ApiError(403, message, kind="permission_error", code="webhook_closed")
        body = await request.body()
        why = check_delivery(request.headers, body, key, time.time())
        if why is not None:
            raise ApiError(401, why, kind="authentication_error", code="invalid_signature")
        if poller is not None and _concerns(body, line):
            poller.wake()
        return Response(status_code=202)


def signature(key: bytes, delivery: str, sent: str, body: bytes) -> str:
    """Return MLflow's value of ``x-mlflow-signature``."""
    content = b".".join((delivery.encode("latin-1"), sent.encode("latin-1"), body))
    return "v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()


def check_delivery(headers: Any, body: bytes, key: bytes, now: float) -> str | None:
    """Return why a delivery is rejected; None if it is authentic and recent.

    Args:
        headers: Headers of the request; case-insensitive.
        body: Raw body.
        key: Shared secret.
        now: Unix time.
    """
    names = ("delivery-id", "timestamp", "signature")
    delivery, sent, signed = (headers.get(f"x-mlflow-{name}", "") for name in names)
    # Header values arrive as latin-1.
    if not hmac.compare_digest(signature(key, delivery, sent, body).encode(), signed.encode("latin-1")):
        return "The signature does not match the secret of serve.webhook_secret"
    if not sent.isdecimal() or abs(now - int(sent)) > MAX_AGE_S:
        return f"The delivery is more than {MAX_AGE_S:.0f} s old, or in the future: check both clocks"
    return None


def _concerns(body: bytes, line: str) -> bool:
    """Return whether a delivery concerns the line; one that names no model counts as concerning it."""
    with suppress(ValueError, AttributeError):
        name = json.loads(body).get("data", {}).get("name")
        return name is None or name == model_name(line)
    return True
