"""Tasks that outlive the function that starts them, none of which is ever lost or ignored."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from baton.core.log import get_logger

_log = get_logger("tasks")


class TaskSet:
    """Owns background tasks: keeps them alive, tells what goes wrong in them, ends them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.crashed: list[BaseException] = []
        """Exceptions that a task let out: bugs, since every expected error is handled inside."""

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `coroutine` as a task of this set."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.crashed.append(error)
            _log.error("a background task crashed", exc_info=error)

    async def drain(self, timeout_s: float) -> None:
        """Give the tasks `timeout_s` seconds to end by themselves, then cancel the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        rest = list(self._tasks)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def check(self) -> None:
        """Assert that no task is left and none has crashed."""
        assert not self._tasks, f"{len(self._tasks)} tasks are left"
        assert not self.crashed, f"tasks crashed: {self.crashed!r}"
