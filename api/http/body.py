"""Read a request's JSON body: bounded in size and time, and strict."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

from baton.api.validate import INLINE_BYTES, ServedModel
from baton.core.clock import monotonic
from baton.core.config import EdgeLimits
from baton.core.errors import InvalidRequest

Result = TypeVar("Result")


class Body:
    """A body that was read."""

    def __init__(self, value: object, size: int) -> None:
        self.value = value
        """What its JSON says; not checked."""
        self._size = size

    async def checked(
        self, check: Callable[[object, ServedModel], Result], model: ServedModel
    ) -> Result:
        """Return what `check` makes of it for a model; raises its errors."""
        return await _beside(self._size, check, self.value, model)


async def read_body(request: Request, limits: EdgeLimits) -> Body:
    """Read and parse it; raises InvalidRequest, or HTTPException 408, 413, 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"content-type: {kind[:80]!r}; allowed: application/json")
    raw = await _read(request, limits)
    request.state.read_at = monotonic()
    return Body(await _beside(len(raw), _parse, raw), len(raw))


async def _beside(size: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Do it here, or in a thread where that would hold up others."""
    if size <= INLINE_BYTES:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


async def _read(request: Request, limits: EdgeLimits) -> bytes:
    most, timeout_s = limits.max_body_bytes, limits.body_timeout_s
    too_large = HTTPException(413, f"the body is larger than {most} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    raw = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > most:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"the body took longer than {timeout_s:g} s") from None
    return bytes(raw)


def _parse(raw: bytes) -> object:
    try:
        return json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise InvalidRequest("body", raw[:80], f"JSON ({reason[:120]})") from None


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
