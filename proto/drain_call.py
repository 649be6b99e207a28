"""The Drain call, which the services of both roles answer in the same way."""

from collections.abc import Awaitable, Callable
from typing import Any

from baton.core.errors import BatonError
from baton.proto import worker_pb2 as pb
from baton.proto.errors import to_status


async def answer_drain(
    request: pb.DrainRequest, context: Any, drain: Callable[[float], Awaitable[int]]
) -> pb.DrainReply:
    """Drain, and say how much was handed over; a caller that goes away calls nothing off."""
    try:
        return pb.DrainReply(handed_over=await drain(request.deadline_s))
    except BatonError as error:
        await context.abort(*to_status(error))
        raise
