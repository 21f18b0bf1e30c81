"""``POST /webhooks/registry``: the registry says that an alias has moved, and the node looks at once.

MLflow signs what it sends as Standard Webhooks do: HMAC-SHA-256 over ``delivery id.time.body`` with the secret that the
webhook was made with, in the header ``x-mlflow-signature``. Nothing of the body is believed: it makes the node ask the
registry sooner than it would have. Polling goes on, and is what a node relies on.
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
from serving.http.requests import ApiError
from serving.versions.poller import Puller

PATH = "/webhooks/registry"
MAX_AGE_S = 300.0
"""Of a delivery, by the clock of this machine: what was recorded cannot be sent again later."""


def add(app: FastAPI, secret: SecretStr, line: str, puller: Puller | None) -> None:
    """Add the endpoint to the application."""

    @app.post(PATH, status_code=202)
    async def moved(request: fastapi.Request) -> Response:
        key = secret.get_secret_value().encode()
        if not key:
            message = "The endpoint is closed: this node has no secret (set serve.webhook_secret)"
            raise ApiError(403, message, kind="permission_error", code="webhook_closed")
        body = await request.body()
        why = refusal(request.headers, body, key, time.time())
        if why is not None:
            raise ApiError(401, why, kind="authentication_error", code="invalid_signature")
        if puller is not None and _concerns(body, line):
            puller.wake()
        return Response(status_code=202)


def signature(key: bytes, delivery: str, sent: str, body: bytes) -> str:
    """What MLflow puts into ``x-mlflow-signature``."""
    content = b".".join((delivery.encode("latin-1"), sent.encode("latin-1"), body))
    return "v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()


def refusal(headers: Any, body: bytes, key: bytes, now: float) -> str | None:
    """Why a delivery is not taken; None if it is the registry's, and of now.

    Args:
        headers: Of the request; names in any case.
        body: As it came.
        key: The secret that both sides know.
        now: Unix time.
    """
    names = ("delivery-id", "timestamp", "signature")
    delivery, sent, signed = (headers.get(f"x-mlflow-{name}", "") for name in names)
    # Header values arrive as latin-1.
    if not hmac.compare_digest(signature(key, delivery, sent, body).encode(), signed.encode("latin-1")):
        return "The signature is not one with the secret of serve.webhook_secret"
    if not sent.isdecimal() or abs(now - int(sent)) > MAX_AGE_S:
        return f"The delivery is more than {MAX_AGE_S:.0f} s old, or from the future: look at both clocks"
    return None


def _concerns(body: bytes, line: str) -> bool:
    """Whether it is about the line; what says of no model is taken as if it were."""
    with suppress(ValueError, AttributeError):
        name = json.loads(body).get("data", {}).get("name")
        return name is None or name == model_name(line)
    return True
