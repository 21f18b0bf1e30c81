"""Errors of the HTTP API in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastapi
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

_PATH_ERRORS = {404: "unknown_url", 405: "method_not_allowed"}
_HEADERS = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}
_SERVER_ERRORS = 500


class ApiError(Exception):
    """An error response with OpenAI's body."""

    def __init__(self, status: int, message: str, *, kind: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return the error as a response."""
        return JSONResponse(self.body, status_code=self.status, headers=_HEADERS.get(self.status))


Reject = Callable[[ApiError], Response]
"""Counts a rejected request and returns its response."""


def invalid_request(message: str, param: str | None, code: str = "invalid_value", status: int = 400) -> ApiError:
    """Return the error of a request that is itself invalid."""
    return ApiError(status, message, kind="invalid_request_error", code=code, param=param)


def unavailable(message: str, code: str = "engine_unavailable") -> ApiError:
    """Return the error of a node that cannot answer now."""
    return ApiError(503, message, kind="server_error", code=code)


def install_handlers(app: FastAPI, count_rejected: Callable[[], None]) -> None:
    """Give every error OpenAI's shape; ``count_rejected`` is called for each rejected request of the API."""

    def respond(request: fastapi.Request, error: ApiError) -> JSONResponse:
        if request.method == "POST" and request.url.path.startswith("/v1/") and error.status < _SERVER_ERRORS:
            count_rejected()
        return error.response()

    @app.exception_handler(ApiError)
    async def handle_api_error(request: fastapi.Request, error: ApiError) -> JSONResponse:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def handle_invalid_body(request: fastapi.Request, error: RequestValidationError) -> JSONResponse:
        return respond(request, _describe(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def handle_path_error(request: fastapi.Request, error: HTTPException) -> JSONResponse:
        code = _PATH_ERRORS.get(error.status_code, "invalid_request")
        return respond(request, invalid_request(error.detail, None, code, error.status_code))

    @app.exception_handler(Exception)
    async def handle_failure(_request: fastapi.Request, _error: Exception) -> JSONResponse:
        # Starlette raises the error again after the response, so that the server logs it.
        message = "The node failed; its log has the reason"
        return ApiError(500, message, kind="server_error", code="internal_error").response()


def _describe(error: Any) -> ApiError:
    """Return the first validation error of pydantic in OpenAI's shape."""
    path = [str(part) for part in error["loc"] if part != "body"]
    param = ".".join(filter(None, [*path, error.get("ctx", {}).get("param")]))
    if not param and isinstance(error["input"], bytes | str):
        message = "The body was not read: it needs the header 'Content-Type: application/json'"
        return invalid_request(message, "content-type", "unsupported_content_type")
    match error["type"]:
        case "extra_forbidden":
            return invalid_request(f"Unrecognized request argument: {param}", param, "unknown_parameter")
        case "unsupported":
            message = f"{param}: this value is not supported by this server"
            return invalid_request(message, param, "unsupported_parameter")
        case "missing" if param:
            return invalid_request(f"Missing required parameter: {param}", param, "missing_required_parameter")
        case "json_invalid":
            return invalid_request("The body is not valid JSON", None, "invalid_json")
        case _:
            return invalid_request(f"{param or 'The body'}: {error['msg']}", param or None)
