"""What the console and `baton top` show: instances, load, and the requests that ended lately."""

import time
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from baton import __version__
from baton.api.gateway import Gateway, InstanceView
from baton.api.traces import KeptTrace
from baton.core.errors import InvalidRequest
from baton.core.topology import Role

_ROWS = 50
_MOST_ROWS = 200
"""Traces in one answer."""
_MOST_INSTANCES = 1024
"""Of one pool, in one answer."""


def add_status_routes(app: FastAPI, gateway: Gateway) -> None:
    """Add GET /v1/status, for admins (see api/http/edge.py), and GET /v1/requests."""

    @app.get("/v1/status")
    async def status() -> JSONResponse:
        return JSONResponse(status_of(gateway))

    @app.get("/v1/requests")
    async def requests(request: Request) -> JSONResponse:
        limit = _limit(request.query_params.get("limit"))
        kept = gateway.newest_traces(request.state.caller, limit)
        return JSONResponse({"object": "list", "data": [_row(k) for k in kept]})


def status_of(gateway: Gateway) -> dict[str, Any]:
    """Return a snapshot: pools with a row per instance, and totals from which rates can be told.

    Times are in seconds. `clock_s` is monotonic: differences of totals over differences of it are
    rates, whatever becomes of the answers in between.
    """
    stats, views = gateway.stats(), gateway.instances()
    pools = ((role, [v for v in views if v.info.role is role]) for role in Role)
    return {
        "version": __version__,
        "model": gateway.model_name,
        "clock_s": gateway.now(),
        "uptime_s": max(0.0, time.time() - gateway.created),
        "problems": gateway.health(),
        "requests": {
            "open": stats.open_requests,
            "limit": gateway.config.max_open_requests,
            "waiting": stats.waiting,
            "admitted": stats.router.admitted,
            "refused": stats.router.overloaded + stats.router.unavailable,
            "prompt_tokens": stats.prompt_tokens,
            "output_tokens": stats.output_tokens,
        },
        "last_minute": {"ttft_s": _p90(stats.ttft_s), "tpot_s": _p90(stats.tpot_s)},
        "pools": [
            {
                "role": role,
                "size": len(members),
                "instances": [_instance(view) for view in members[:_MOST_INSTANCES]],
            }
            for role, members in pools
            if members
        ],
    }


def _p90(seconds: float | None) -> dict[str, float]:
    return {} if seconds is None else {"p90": seconds}


def _instance(view: InstanceView) -> dict[str, Any]:
    """Return a row; with what the instance says of itself only if it answers."""
    info, report = view.info, view.report
    row: dict[str, Any] = {
        "instance_id": info.instance_id,
        "incarnation": str(info.incarnation),  # as text: JSON readers round numbers of 64 bits
        "ranks": info.ranks,
        "kv_tokens": info.kv_tokens,
        "max_sequences": info.max_sequences,
        "up": report is not None,
        "usable": view.usable,
        "our_requests": view.load.requests,
    }
    if report is not None:
        row |= asdict(report)
    return row


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
