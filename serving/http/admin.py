"""The operator's hand on the speculator: pin a version, follow the alias again, switch speculation off and on.

Every endpoint wants ``Authorization: Bearer`` with the token of ``serve.admin_token`` or one of those in
``serve.admin_tokens_file``; without any there is no way in.
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
from serving.http.auth import AdminTokens, opens
from serving.http.requests import ApiError
from serving.http.status import refused_of, swaps_of
from serving.versions.cache import RefusedError, RegistryError, UnknownVersionError
from serving.versions.poller import Puller

_WAIT_S = 30.0
"""How long an order may take before the answer is that it is under way."""
_SWAPS_SHOWN = 10


class Pin(BaseModel):
    """The body of ``POST /admin/speculator/pin``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(min_length=1, max_length=64)


def add(app: FastAPI, serve: Serve, engine: HotSwapEngine, puller: Puller | None) -> None:
    """Add the endpoints to the application."""
    router = APIRouter(prefix="/admin/speculator", dependencies=[Depends(_only_with(AdminTokens(serve)))])

    @router.get("")
    async def show() -> SpeculatorStatus:
        return describe(serve, engine, puller)

    @router.post("/pin")
    async def pin(body: Pin) -> JSONResponse:
        return await carried_out(_speculating(puller).pin(body.version))

    @router.post("/unpin")
    async def unpin() -> JSONResponse:
        return await carried_out(_speculating(puller).unpin())

    @router.post("/off")
    async def off() -> SpeculatorStatus:
        _switch(engine, on=False)
        return describe(serve, engine, puller)

    @router.post("/on")
    async def on() -> SpeculatorStatus:
        _speculating(puller)
        _switch(engine, on=True)
        return describe(serve, engine, puller)

    async def carried_out(order: Future[None]) -> JSONResponse:
        done, _ = await asyncio.wait({asyncio.wrap_future(order)}, timeout=_WAIT_S)
        for outcome in done:
            if error := outcome.exception():
                raise _explain(error) from error
        return JSONResponse(describe(serve, engine, puller).model_dump(), status_code=200 if done else 202)

    app.include_router(router)


def describe(serve: Serve, engine: HotSwapEngine, puller: Puller | None) -> SpeculatorStatus:
    """What is served, and what decides it."""
    health = engine.health()
    return SpeculatorStatus(
        line=engine.line,
        version=health.speculator,
        alias=serve.alias,
        alias_version=puller.named if puller else None,
        canary_version=puller.canary if puller else None,
        role=puller.role if puller else None,
        update_blocked=puller.held if puller else None,
        pending_version=puller.waiting if puller else None,
        update_interval_s=puller.interval_s if puller else 0.0,
        pinned=puller.pinned if puller else None,
        speculating=health.speculating,
        registry_error=puller.error if puller else None,
        swaps=swaps_of(puller)[-_SWAPS_SHOWN:],
        versions_rejected=refused_of(puller),
    )


def _only_with(tokens: AdminTokens) -> Callable[[str], None]:
    def check(authorization: Annotated[str, fastapi.Header()] = "") -> None:
        known = tokens.now()
        if not known:
            message = (
                "The admin endpoints are closed: this node has no token (set serve.admin_token, or "
                "serve.admin_tokens_file with a file that has one)"
            )
            raise ApiError(403, message, kind="permission_error", code="admin_closed")
        scheme, _, given = authorization.partition(" ")
        # Header values arrive as latin-1, the token may be anything.
        if scheme.lower() != "bearer" or not opens(given.strip().encode("latin-1"), known):
            message = "Send a token of serve.admin_token or serve.admin_tokens_file as 'Authorization: Bearer TOKEN'"
            raise ApiError(401, message, kind="authentication_error", code="invalid_token")

    return check


def _switch(engine: HotSwapEngine, *, on: bool) -> None:
    try:
        engine.speculate(on=on)
    except SpeculationFixedError as error:
        raise ApiError(409, str(error), kind="invalid_request_error", code="speculation_fixed") from error


def _speculating(puller: Puller | None) -> Puller:
    if puller is None:
        message = "This node was started without speculation (serve.speculate)"
        raise ApiError(409, message, kind="invalid_request_error", code="speculation_disabled")
    return puller


def _explain(error: BaseException) -> ApiError:
    match error:
        case UnknownVersionError():
            return ApiError(404, str(error), kind="invalid_request_error", code="version_not_found", param="version")
        case RefusedError():
            return ApiError(409, str(error), kind="invalid_request_error", code="version_refused", param="version")
        case RegistryError():
            return ApiError(503, str(error), kind="server_error", code="registry_unavailable")
        case _:
            return ApiError(500, f"{type(error).__name__}: {error}", kind="server_error", code="pin_failed")
