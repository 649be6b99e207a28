"""The process of one rank, seen from the driver: start what it hosts, notice its end, close it."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.cluster import ray_calls
from baton.cluster.instance_actor import CALLS_AT_ONCE, InstanceActor
from baton.cluster.log_tail import tail_of
from baton.core.cluster_spec import RankResources
from baton.core.config import LeaderRef, WorkerConfig
from baton.core.errors import BatonError, DeadlineExceeded, InstanceLost, Unavailable

_TAIL_LINES = 15
_RELAY_GRACE_S = 2.0
_BEGUN_TIMEOUT_S = 30.0
"""For a process that Ray may still be starting."""
_CREATE_TIMEOUT_S = 10.0
"""For Ray to take note of an actor; its process starts after that."""
_MARGIN_S = 5.0
"""How much later than the process's own deadline ours is."""
_PROBE_EVERY_S = 2.0
_PROBE_WAITS = 3
"""Of `_PROBE_EVERY_S` for one answer. More than one: if it was this process that stood still, the
answer is there by the second."""


_ASKED_FOR_S = 20.0
"""How long one question whether it is closed waits in there. It has an end since a controller that
dies leaves its question behind, in one of the few threads that there are for calls."""


class RankProcess:
    """An actor and what it hosts; `create` and `start` it once, and always `kill` it."""

    def __init__(self, name: str, log_path: Path, on_progress: Callable[[str], None]) -> None:
        self._name = name
        self._log_path = log_path
        self._on_progress = on_progress
        self._actor: ray_calls.Actor = None
        self._actor_name: str | None = None
        self._last_line = "none"

    def __repr__(self) -> str:
        return f"RankProcess({self._name})"

    async def create(
        self,
        group: ray_calls.Places,
        place: int,
        resources: RankResources,
        actor_name: str | None,
    ) -> None:
        """Start the process in one place of a group; raises Unavailable if Ray fails."""
        self._actor_name = actor_name
        self._actor = await ray_calls.create_actor(
            InstanceActor,
            self._log_path,
            group=group,
            place=place,
            resources=resources,
            name=actor_name,
            concurrency=CALLS_AT_ONCE,
            timeout_s=_CREATE_TIMEOUT_S,
        )

    async def find(self, actor_name: str) -> None:
        """Take over the process that another controller created; InstanceLost if it is gone."""
        self._actor_name = actor_name
        self._actor = await ray_calls.find_actor(actor_name, _CREATE_TIMEOUT_S)

    async def started(self, timeout_s: float) -> Any:
        """Wait until it has started what it was told to; return what that says of itself.

        Raises InstanceLost if nobody has told it yet: who should have is gone.
        """
        if not await ray_calls.call(self._actor, "begun", timeout_s=_BEGUN_TIMEOUT_S):
            raise InstanceLost("its controller ended before it was told to start")
        return await ray_calls.call(self._actor, "started", timeout_s=timeout_s)

    async def start(self, factory: str, config: WorkerConfig, timeout_s: float) -> Any:
        """Start the class `factory` in it; return what it says of itself once it is ready.

        Raises what it raised, InstanceLost if its process ended, DeadlineExceeded after
        `timeout_s`; the message has the last progress line and the end of its log.
        """
        relay = asyncio.create_task(self._relay_progress())
        try:
            info = await ray_calls.call(self._actor, "start", factory, config, timeout_s=timeout_s)
            await asyncio.wait({relay}, timeout=_RELAY_GRACE_S)
            return info
        except BatonError as error:
            raise await self._explained(error, timeout_s) from None
        finally:
            await drop(relay)

    async def leader(self, timeout_s: float) -> LeaderRef | None:
        """Wait until it says where it waits for the other ranks; None if it never will."""
        found: LeaderRef | None = await ray_calls.call(self._actor, "leader", timeout_s=timeout_s)
        return found

    async def ended(self) -> None:
        """Wait until its process or what it hosts has ended, or hangs; raises InstanceLost then.

        The event loop in there is free even while the model computes, so whatever does not answer
        for `_PROBE_WAITS * _PROBE_EVERY_S` seconds is stopped, or stuck.
        """
        closed = asyncio.ensure_future(self._closed())
        try:
            while not closed.done():
                await self._expect_answer(closed)
                await asyncio.wait({closed}, timeout=_PROBE_EVERY_S)
            closed.result()
            raise InstanceLost("its worker closed")
        finally:
            await drop(closed)

    async def stats(self, timeout_s: float) -> dict[str, float | int | str]:
        """Return the counters of what it hosts."""
        found: dict[str, float | int | str] = await ray_calls.call(
            self._actor, "stats", timeout_s=timeout_s
        )
        return found

    async def drain(self, deadline_s: float) -> None:
        """Let it take no more requests, and end or move those that are open."""
        await ray_calls.call(self._actor, "drain", deadline_s, timeout_s=deadline_s + _MARGIN_S)

    async def close(self, grace_s: float) -> None:
        """Close what it hosts; DeadlineExceeded after `grace_s`."""
        await ray_calls.call(self._actor, "close", timeout_s=grace_s)

    async def kill(self) -> None:
        """End its process at once, also one that was being created when we were cancelled."""
        if self._actor is None and self._actor_name is not None:
            with contextlib.suppress(InstanceLost, Unavailable):
                self._actor = await ray_calls.find_actor(self._actor_name, _CREATE_TIMEOUT_S)
        if self._actor is not None:
            await ray_calls.kill(self._actor)

    async def _closed(self) -> None:
        """Return once what it hosts has been closed; a dead process answers with an error."""
        while not await ray_calls.call(self._actor, "wait_closed", _ASKED_FOR_S):
            pass

    async def _expect_answer(self, closed: "asyncio.Future[None]") -> None:
        """Ask for its counters, unless it is closed; InstanceLost if it does not answer."""
        probe = asyncio.ensure_future(ray_calls.call(self._actor, "stats"))
        try:
            for _ in range(_PROBE_WAITS):
                await asyncio.wait(
                    {probe, closed}, timeout=_PROBE_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                if probe.done() or closed.done():
                    return
            raise InstanceLost("it does not answer")
        finally:
            await drop(probe)  # an error is an answer too

    async def _relay_progress(self) -> None:
        seen = 0
        while lines := await ray_calls.call(self._actor, "progress", seen):
            seen += len(lines)
            for line in lines:
                self._last_line = line
                self._on_progress(line)

    async def _explained(self, error: BatonError, timeout_s: float) -> BatonError:
        """Name the process, and add what helps to find the reason."""
        if isinstance(error, DeadlineExceeded):
            text = f"{self._name} was not ready after {timeout_s:g} s"
            return DeadlineExceeded(
                f"{text}; last progress: {self._last_line}{await self._log_tail()}"
            )
        if type(error).code in ("instance_lost", "internal"):
            text = f"{self._name} failed to start: {error}; last progress: {self._last_line}"
            return type(error)(text + await self._log_tail())
        return error

    async def _log_tail(self) -> str:
        lines = await tail_of(self._log_path, _TAIL_LINES)
        return "\n".join(["\nThe end of its log:", *(lines or ["(empty)"])])


async def drop(task: "asyncio.Future[Any]") -> None:
    """End a task whose outcome, be it an error, is of no interest any more."""
    task.cancel()
    await asyncio.wait({task})
