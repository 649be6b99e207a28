"""The seam to Ray, without a Ray."""

import asyncio
import threading

import pytest

from baton.cluster import ray_calls
from baton.core.errors import Unavailable


@pytest.mark.parametrize(
    "error", [ray_calls.ray_errors.RaySystemError("its head is gone"), ConnectionError("no route")]
)
async def test_no_error_of_ray_gets_out_of_a_call_that_blocks(error: Exception) -> None:
    def failing() -> None:
        raise error

    with pytest.raises(Unavailable, match=r"its head is gone|no route"):
        await ray_calls._in_thread(failing, timeout_s=20)


async def test_a_call_that_never_returns_keeps_nobody_waiting() -> None:
    never = threading.Event()
    with pytest.raises(Unavailable, match=r"within 0\.01 s"):
        await ray_calls._in_thread(never.wait, timeout_s=0.01)
    never.set()


async def test_a_call_under_way_is_waited_for_when_its_task_is_cancelled() -> None:
    begun, go_on = threading.Event(), threading.Event()
    returned = []

    def slow() -> None:
        begun.set()
        go_on.wait(20)
        returned.append(True)

    task = asyncio.create_task(ray_calls._in_thread(slow, timeout_s=20))
    await asyncio.to_thread(begun.wait, 20)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert returned
