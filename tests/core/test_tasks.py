import asyncio

import pytest

from baton.core.tasks import TaskSet


async def test_tasks_are_kept_until_they_end() -> None:
    tasks, gate = TaskSet(), asyncio.Event()
    tasks.start(gate.wait())
    assert len(tasks) == 1
    with pytest.raises(AssertionError, match="1 tasks are left"):
        tasks.check()
    gate.set()
    await tasks.drain(1)
    tasks.check()


async def test_a_crash_is_told_and_fails_the_check() -> None:
    async def crash() -> None:
        raise ValueError("a bug")

    tasks = TaskSet()
    tasks.start(crash())
    await tasks.drain(1)
    assert [str(error) for error in tasks.crashed] == ["a bug"]
    with pytest.raises(AssertionError, match="a bug"):
        tasks.check()


async def test_drain_cancels_what_does_not_end_and_a_cancelled_task_is_no_crash() -> None:
    tasks = TaskSet()
    endless = tasks.start(asyncio.Event().wait())
    await tasks.drain(0.01)
    assert endless.cancelled()
    tasks.check()
