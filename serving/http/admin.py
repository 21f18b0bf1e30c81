"""Admin API of the speculator: show it, pin a version, follow the alias again, switch speculation off and on.

Every endpoint requires ``Authorization: Bearer`` with the token of ``serve.admin_token``, or with one of
``serve.admin_tokens_file``. Without any token the endpoints are closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Annotated

import fastapi
from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from schemas.settings import Serve
from schemas.status import SpeculatorStatus
from serving.engines.base import HotSwapEngine, SpeculationFixedError
from serving.http import errors
from serving.http.errors import ApiError
from serving.http.requests import BodyLimit
from serving.http.tokens import TokenFile, is_authorized
from serving.versions.cache import RegistryError, RejectedVersionError, UnknownVersionError
from serving.versions.poller import VersionPoller

_TIMEOUT_S = 30.0
"""A pin that takes longer is answered with 202: it is still in progress."""
_SWAPS_SHOWN = 10


class PinBody(BaseModel):
    """The body of ``POST /admin/speculator/pin``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(min_length=1, max_length=64)


def create_app(serve: Serve) -> FastAPI:
    """Return an application for operators' endpoints only, without the API."""
    app = FastAPI(title="Aurora Stream", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=serve.max_body_bytes, reject=ApiError.response)
    errors.install_handlers(app, lambda: None)
    return app


def add_routes(app: FastAPI, serve: Serve, engine: HotSwapEngine, poller: VersionPoller | None) -> None:
    """Add the endpoints to the application.

    Raises:
        SettingsError: ``serve.admin_tokens_file`` cannot be read.
    """
    router = APIRouter(prefix="/admin/speculator", dependencies=[Depends(_authenticate(serve))])

    @router.get("")
    async def show() -> SpeculatorStatus:
        """Show the active version and the state that selects it."""
        return speculator_status(serve, engine, poller)

    @router.post("/pin")
    async def pin(body: PinBody) -> JSONResponse:
        """Fetch, check and swap in a version, and keep it whatever the alias names."""
        return await respond(_require(poller).pin(body.version))

    @router.post("/unpin")
    async def unpin() -> JSONResponse:
        """Follow the alias again."""
        return await respond(_require(poller).unpin())

    @router.post("/off")
    async def off() -> SpeculatorStatus:
        """Stop drafting from the next verify step on."""
        _switch_speculation(engine, on=False)
        return speculator_status(serve, engine, poller)

    @router.post("/on")
    async def on() -> SpeculatorStatus:
        """Resume drafting with the active version."""
        if not serve.speculate:
            raise _disabled("This node was started without speculation (serve.speculate)")
        _switch_speculation(engine, on=True)
        return speculator_status(serve, engine, poller)

    async def respond(result: Future[None]) -> JSONResponse:
        done, _ = await asyncio.wait({asyncio.wrap_future(result)}, timeout=_TIMEOUT_S)
        for outcome in done:
            if error := outcome.exception():
                raise _api_error(error) from error
        body = speculator_status(serve, engine, poller).model_dump()
        return JSONResponse(body, status_code=200 if done else 202)

    app.include_router(router)


def speculator_status(serve: Serve, engine: HotSwapEngine, poller: VersionPoller | None) -> SpeculatorStatus:
    """Return the active version, and the state that selects it."""
    health = engine.health()
    return SpeculatorStatus(
        line=engine.line,
        version=health.speculator,
        alias=serve.alias,
        alias_version=poller.alias_version if poller else None,
        canary_version=poller.canary if poller else None,
        anchor_version=poller.anchor if poller else None,
        role=poller.role if poller else None,
        update_blocked=poller.update_blocked if poller else None,
        pending_version=poller.pending_version if poller else None,
        update_interval_s=poller.update_interval_s if poller else 0.0,
        pinned=poller.pinned if poller else None,
        speculating=health.speculating,
        registry_error=poller.error if poller else None,
        swaps=list(poller.swaps[-_SWAPS_SHOWN:]) if poller else [],
        versions_rejected=list(poller.rejected) if poller else [],
    )


def _authenticate(serve: Serve) -> Callable[[str], None]:
    token = serve.admin_token.get_secret_value().encode()
    file = TokenFile("serve.admin_tokens_file", serve.admin_tokens_file) if serve.admin_tokens_file else None

    def authenticate(authorization: Annotated[str, fastapi.Header()] = "") -> None:
        known = ([token] if token else []) + (file.read() if file else [])
        if not known:
            message = (
                "The admin endpoints are closed: this node has no token (set serve.admin_token, or "
                "serve.admin_tokens_file with a file that has one)"
            )
            raise ApiError(403, message, kind="permission_error", code="admin_closed")
        if not is_authorized(authorization, known):
            message = "Send a token of serve.admin_token or serve.admin_tokens_file as 'Authorization: Bearer TOKEN'"
            raise ApiError(401, message, kind="authentication_error", code="invalid_token")

    return authenticate


def _switch_speculation(engine: HotSwapEngine, *, on: bool) -> None:
    try:
        engine.speculate(on=on)
    except SpeculationFixedError as error:
        raise ApiError(409, str(error), kind="invalid_request_error", code="speculation_fixed") from error


def _require(poller: VersionPoller | None) -> VersionPoller:
    if poller is None:
        raise _disabled("This node uses no versions (serve.speculate, serve.drafter)")
    return poller


def _disabled(message: str) -> ApiError:
    return ApiError(409, message, kind="invalid_request_error", code="speculation_disabled")


def _api_error(error: BaseException) -> ApiError:
    match error:
        case UnknownVersionError():
            return ApiError(404, str(error), kind="invalid_request_error", code="version_not_found", param="version")
        case RejectedVersionError():
            return ApiError(409, str(error), kind="invalid_request_error", code="version_rejected", param="version")
        case RegistryError():
            return ApiError(503, str(error), kind="server_error", code="registry_unavailable")
        case _:
            return ApiError(500, f"{type(error).__name__}: {error}", kind="server_error", code="pin_failed")
