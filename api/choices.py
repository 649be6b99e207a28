"""The choices of one call, each a request of its own, side by side."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from baton.api.gateway import Gateway
from baton.api.text_stream import Piece
from baton.api.validate import Call

_AHEAD = 8
"""Pieces that may wait for whoever reads them all."""


async def choice_pieces(
    gateway: Gateway, call: Call, timeout_s: float | None = None
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield (index of the choice, piece) as they come, until each choice has had its last.

    `timeout_s` is as in Gateway.generate. The first error ends them all. Close it
    (`contextlib.aclosing`) to cancel what is still open.
    """
    merge = len(call.requests) > 1
    stream = _merged(gateway, call, timeout_s) if merge else _one(gateway, call, 0, timeout_s)
    async with aclosing(stream) as pieces:
        async for item in pieces:
            yield item


async def _one(
    gateway: Gateway, call: Call, index: int, timeout_s: float | None
) -> AsyncGenerator[tuple[int, Piece], None]:
    async with aclosing(gateway.generate(call.requests[index], timeout_s)) as pieces:
        async for piece in pieces:
            yield index, piece


async def _merged(
    gateway: Gateway, call: Call, timeout_s: float | None
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Merge several requests; a task each puts its pieces into one small queue."""
    merged: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue(_AHEAD)

    async def pump(index: int) -> None:
        try:
            async with aclosing(_one(gateway, call, index, timeout_s)) as pieces:
                async for item in pieces:
                    await merged.put(item)
        except Exception as error:  # It is raised by the reader of the queue.
            await merged.put(error)

    tasks = [asyncio.create_task(pump(index)) for index in range(len(call.requests))]
    try:
        open_choices = len(tasks)
        while open_choices:
            item = await merged.get()
            if isinstance(item, Exception):
                raise item
            open_choices -= item[1].finish is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
