import asyncio

import structlog

from baton.core import log


async def test_what_is_bound_is_on_every_line_of_the_task_and_on_no_other():
    async def seen() -> dict[str, object]:
        return structlog.contextvars.get_contextvars()

    with log.bound(tenant="acme", key="3f9a61c2b0de"):
        inside = await asyncio.create_task(seen())
    assert inside == {"tenant": "acme", "key": "3f9a61c2b0de"}
    assert await seen() == {}
