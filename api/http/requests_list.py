"""The requests that ended lately, as the console lists them."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from baton.api.gateway import Gateway
from baton.api.traces import KeptTrace
from baton.core.errors import InvalidRequest

_ROWS = 50
_MOST_ROWS = 200
"""Traces in one answer."""


def add_requests_route(app: FastAPI, gateway: Gateway) -> None:
    """Add GET /v1/requests."""

    @app.get("/v1/requests")
    async def requests(request: Request) -> JSONResponse:
        limit = _limit(request.query_params.get("limit"))
        kept = gateway.newest_traces(request.state.caller, limit)
        return JSONResponse({"object": "list", "data": [_row(k) for k in kept]})


def _row(kept: KeptTrace) -> dict[str, Any]:
    """Return a trace without the gaps between its tokens: those are told of one at a time."""
    row = kept.trace.as_dict() | {"ended_at": kept.ended_at}
    del row["itl_s"]
    return row


def _limit(text: str | None) -> int:
    if text is None:
        return _ROWS
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= _MOST_ROWS):
        raise InvalidRequest("limit", text[:80], f"a whole number from 1 to {_MOST_ROWS}")
    return int(text)
