"""ASGI middleware for ``--middleware``: vLLM's development endpoints require the node's key.

``VLLM_SERVER_DEV_MODE=1`` opens them on the port of the API, where ``--api-key`` does not cover them. The node needs
one of them; no client may call any.
"""

from __future__ import annotations

from typing import Any

from schemas.settings import load
from serving.http.tokens import is_authorized


class DeveloperEndpoints:
    """Rejects calls of the development endpoints without the key.

    Args:
        app: The application that is protected.
        paths: Paths of these endpoints; None asks the installed vLLM.
    """

    def __init__(self, app: Any, paths: frozenset[str] | None = None) -> None:
        self._app = app
        self._paths = _read_paths() if paths is None else paths
        key = load().vllm.api_key.get_secret_value()
        self._keys = [key.encode()] if key else []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        if path.rstrip("/") not in self._paths or is_authorized(_authorization(scope), self._keys):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "only the node may call this endpoint"}'})


def _authorization(scope: Any) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), "")


def _read_paths() -> frozenset[str]:
    from fastapi import FastAPI
    from vllm.entrypoints.rl.factories import register_rl_api_routers
    from vllm.entrypoints.serve import register_vllm_dev_api_routers

    app = FastAPI(openapi_url=None)
    register_vllm_dev_api_routers(app)
    register_rl_api_routers(app)
    return frozenset(str(getattr(route, "path", "")) for route in app.routes)
