"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from baton.core.errors import (
    BatonError,
    Cancelled,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unauthenticated,
)
from baton.core.log import get_logger

_log = get_logger("http")
_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
    503: "unavailable",
}
"""Of errors that only HTTP knows."""


def error_body(error: BatonError) -> dict[str, Any]:
    """Return the body for one of Baton's errors."""
    param = error.field if isinstance(error, InvalidRequest) else None
    return _body(error.message, _type(error.http_status), param, error.code)


def error_response(error: BatonError) -> JSONResponse:
    """Return the response for one of Baton's errors."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.http_status, headers)


def http_error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return the response for an error that only HTTP knows."""
    body = _body(message, _type(status), None, _CODES.get(status, "http_error"))
    return JSONResponse(body, status, headers)


def install(app: FastAPI) -> None:
    """Give every error that leaves `app` OpenAI's shape, also those of unknown routes."""
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(BatonError, _on_baton_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


async def _on_baton_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BatonError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = error.status_code
    message = error.detail
    if status in (404, 405):
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return http_error_response(status, message, error.headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=Cancelled.http_status)  # nobody reads it


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    _log.error("a bug ended a request", path=request.url.path, exc_info=error)
    return error_response(InternalError(f"{type(error).__name__} in the gateway; see its log"))


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    shown = None if param is None else _unicode(param)
    return {"error": {"message": _unicode(message), "type": kind, "param": shown, "code": code}}


def _unicode(text: str) -> str:
    """Return a text that can be sent: half of a surrogate pair, from a client, is spelled out."""
    return text.encode(errors="backslashreplace").decode()
