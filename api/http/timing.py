"""Where a call's time to first token went, as an answer tells it on request."""

from collections.abc import Mapping

from fastapi import Request

from baton.api.http.logprobs import Json
from baton.api.validate import Call
from baton.core.clock import monotonic
from baton.core.spans import Arrival, TtftSpans

HEADER = "x-baton-timing"


def arrived(call: Call, request: Request, *, wake_s: float, now: float) -> Call:
    """Return a call that has been found valid `now`, on the gateway's clock.

    It counts from when the body was read: how fast a client sends is its own. Then it waited
    `wake_s` seconds for a decode instance, if there was none.
    """
    caller = request.headers.get("traceparent", "")
    arrival = Arrival(wake_s, monotonic() - request.state.read_at - wake_s, now, caller)
    return call.arrived(arrival, tell_timing=request.headers.get(HEADER) == "1")


def timing(call: Call, spans: Mapping[int, TtftSpans]) -> Json:
    """Return a row for each choice: milliseconds, of those spans that took any time."""
    rows = [
        {
            "index": index,
            "request_id": call.requests[index].generate.request_id,
            "ttft_ms": _ms(told.total_s),
            "spans_ms": {name: _ms(seconds) for name, seconds in told.items() if seconds > 0},
        }
        for index, told in sorted(spans.items())
    ]
    return {"timing": rows}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 4)
