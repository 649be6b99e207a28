"""What the console and `baton top` show: instances, load, and the requests that ended lately."""

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from baton import __version__
from baton.api.gateway import Gateway, InstanceView
from baton.api.traces import KeptTrace
from baton.core.errors import InvalidRequest

_ROWS = 50
_MOST_ROWS = 200
"""Traces in one answer."""


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
    """Return a snapshot: one row per instance, and totals from which rates can be told.

    Times are in seconds. `clock_s` is monotonic: differences of totals over differences of it are
    rates, whatever becomes of the answers in between.
    """
    stats, reasons = gateway.stats(), gateway.health()
    return {
        "version": __version__,
        "model": gateway.model_name,
        "clock_s": gateway.now(),
        "uptime_s": max(0.0, time.time() - gateway.created),
        "reasons": reasons,
        "requests": {
            "open": stats.open_requests,
            "limit": gateway.config.max_open_requests,
            "waiting_for_decode": stats.waiting,
            "admitted": stats.router.admitted,
            "refused": stats.router.overloaded + stats.router.unavailable,
            "ttft_p90_s": stats.ttft_s,
            "tpot_p90_s": stats.tpot_s,
        },
        "tokens": {"prompt": stats.prompt_tokens, "output": stats.output_tokens},
        "instances": [_instance(view) for view in gateway.instances()],
    }


def _instance(view: InstanceView) -> dict[str, Any]:
    info, report = view.info, view.report
    row: dict[str, Any] = {
        "id": info.instance_id,
        "role": info.role,
        "ranks": info.ranks,
        "incarnation": f"{info.incarnation:016x}",  # as text: JavaScript's numbers have 53 bits
        "state": _state(view),
        "max_model_len": info.max_model_len,
        "max_sequences": info.max_sequences,
        "kv_tokens": info.kv_tokens,
        "load_s": info.load_s,
        "gateway": {"requests": view.load.requests, "tokens": view.load.tokens},
        "report": None,
    }
    if report is not None:
        row["report"] = {
            "lease": report.standing,
            "problems": list(report.problems),
            "steps": report.steps,
            "waiting": report.waiting,
            "waited_s": report.waited_s,
            "running": report.running,
            "open_requests": report.open_requests,
            "kv_blocks_used": report.blocks_used,
            "kv_blocks_total": report.blocks_total,
        }
    return row


def _state(view: InstanceView) -> str:
    if view.usable:
        return "ready"
    if view.report is None:
        return "silent"
    return "draining" if view.report.draining else "connecting"


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
