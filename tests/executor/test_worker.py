"""What a worker's process does when what it stands on breaks."""

import asyncio
from typing import Any

import pytest

from baton.executor import worker


async def test_the_process_ends_if_nobody_watches_the_lease_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exits: list[int] = []
    told: list[Any] = []
    monkeypatch.setattr(worker.os, "_exit", exits.append)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))

    async def crash() -> None:
        raise ZeroDivisionError

    for work in (crash(), asyncio.Event().wait()):
        task: asyncio.Task[Any] = asyncio.create_task(work)
        task.add_done_callback(worker._lease_watched)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await asyncio.sleep(0)
    assert exits == [70]  # and not when it is cancelled, as a worker that closes does
    assert [type(error) for error in told] == [ZeroDivisionError]
