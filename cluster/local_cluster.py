"""Baton's cluster on one machine: a Ray head of our own, and the instances that it hosts."""

import asyncio
import math
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from baton.cluster import ray_calls, ray_environment
from baton.cluster.control import Control
from baton.cluster.fleet import Backoff, Phase
from baton.cluster.placement import cpus_of
from baton.cluster.ray_head import RayHead
from baton.cluster.reading import reading
from baton.cluster.spec import spec_of
from baton.cluster.state import ControlState
from baton.cluster.surroundings import FACTORIES, Surroundings
from baton.core.clock import Clock, monotonic
from baton.core.config import ClusterConfig
from baton.core.control_reading import ControlReading
from baton.core.errors import BatonError
from baton.core.ids import InstanceId
from baton.core.log import get_logger
from baton.core.tasks import TaskSet
from baton.core.topology import MembershipBoard, Role

_HEAD_TIMEOUT_S = 60.0
_JOIN_TIMEOUT_S = 30.0
_LEAVE_TIMEOUT_S = 10.0
_KILLS_TIMEOUT_S = 5.0
_LONGEST_TEMP_DIR = 40
"""Ray's Unix sockets lie 62 characters below; the kernel allows 107 in all."""


@dataclass(frozen=True, slots=True)
class ClusterStats:
    """What is there, and how often it had to be made good."""

    ready: int
    desired: int
    losses: int
    membership_version: int


class LocalCluster:
    """`async with LocalCluster(config, say) as cluster:` — every instance is ready inside.

    A lost instance leaves `board` at once and is started again under the same id with a new
    incarnation. On the way out, also when starting is cancelled, everything is ended and removed.
    """

    def __init__(
        self,
        config: ClusterConfig,
        on_progress: Callable[[str], None],
        *,
        factories: Mapping[Role, str] = FACTORIES,
        backoff: Backoff = Backoff(),  # noqa: B008  (frozen)
        clock: Clock = monotonic,
        grace_s: float = 10.0,
    ) -> None:
        self._config = config
        self._say = on_progress
        self._factories = factories
        self._backoff = backoff
        self._clock = clock
        self._grace_s = grace_s
        self._spec = spec_of(config).with_secrets()
        self._control: Control | None = None
        self._running: asyncio.Task[None] | None = None
        self._starting: asyncio.Future[None] | None = None
        """Set while a loss is the answer to whoever waits for everybody to be ready."""
        self._kills = TaskSet()
        self._head: RayHead | None = None
        self._temp_dir: Path | None = None
        self._log = get_logger("cluster")

    def __repr__(self) -> str:
        return f"LocalCluster({self._control or 'not started'})"

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    @property
    def board(self) -> MembershipBoard:
        """Who is ready; one event loop only."""
        return self._controlled().board

    @property
    def temp_dir(self) -> Path:
        """Logs of Ray and of the instances (<instance>.log); removed at the end."""
        assert self._temp_dir is not None, "not started"
        return self._temp_dir

    def processes(self) -> tuple[int, ...]:
        """Return the pids of all that was started: Ray's and the instances'."""
        return tuple(self._head.members()) if self._head else ()

    async def watch(self) -> None:
        """Wait for as long as the cluster is looked after; raises what ends that."""
        assert self._running is not None, "not started"
        assert self._head is not None, "not started"
        head = asyncio.create_task(self._head.ended())
        try:
            await asyncio.wait({self._running, head}, return_when=asyncio.FIRST_COMPLETED)
            for task in (self._running, head):
                if task.done():
                    task.result()
        finally:
            head.cancel()

    def hurry(self) -> None:
        """Let everything that is being closed have no more time."""
        self._grace_s = 0.0
        if self._control is not None:
            self._control.grace_s = 0.0
            self._kills.start(self._control.kill_all())

    def stats(self) -> ClusterStats:
        """Return what is there now."""
        control = self._controlled()
        membership = control.board.current
        desired = sum(wish.count for wish in control.state.wishes())
        return ClusterStats(len(membership.instances), desired, control.losses, membership.version)

    def reading(self) -> ControlReading:
        """Return what metrics tell of the pools, and of what was done."""
        return reading(self._controlled())

    def check(self) -> None:
        """Assert that the membership is what the fleet says."""
        self._controlled().check()

    async def instance_stats(self, name: InstanceId) -> dict[str, float | int | str]:
        """Return one instance's counters; raises InstanceLost if it is not there."""
        return (await self.rank_stats(name))[0]

    async def rank_stats(self, name: InstanceId) -> list[dict[str, float | int | str]]:
        """Return the counters of all ranks of an instance; InstanceLost if it is not there."""
        return await self._controlled().stats(name)

    def _controlled(self) -> Control:
        assert self._control is not None, "not started"
        return self._control

    # ---- start -----------------------------------------------------------------------------

    async def _start(self) -> None:
        self._temp_dir = short_temp_dir()
        self._control = Control(
            ControlState.of(self._spec),
            Surroundings(
                log_dir=self._temp_dir,
                on_progress=self._say,
                on_news=self._heard,
                factories=self._factories,
                backoff=self._backoff,
                clock=self._clock,
            ),
            grace_s=self._grace_s,
        )
        self._say("starting Ray")
        self._head = await RayHead.start(
            self._temp_dir,
            slots=math.ceil(cpus_of(self._spec)),
            environment=ray_environment.head_environment(self._config.threads),
            timeout_s=_HEAD_TIMEOUT_S,
        )
        await ray_calls.connect(self._head.address, _JOIN_TIMEOUT_S)
        pools = self._spec.pools().items()
        names = ", ".join(f"{pool}-{i}" for pool, (_, p) in pools for i in range(p.instances))
        self._say(f"Ray is up (pid {self._head.pid}); starting {names}")
        self._starting = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._control.run())
        await self._until_ready(self._control, self._starting, self._running)

    async def _until_ready(
        self, control: Control, failed: "asyncio.Future[None]", running: "asyncio.Task[None]"
    ) -> None:
        """Wait for all; each instance has a deadline of its own, so this ends."""
        settled = asyncio.create_task(control.settled.wait())
        try:
            waits: set[asyncio.Future[Any]] = {settled, failed, running}
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            settled.cancel()
        self._starting = None

    def _heard(self, name: InstanceId, error: BatonError | None) -> None:
        """Tell of a loss, or that it was made good; while starting up, a loss is an answer."""
        assert self._control is not None, "news before the start"
        starting, seen = self._starting, self._control.state.fleet[name]
        if error is None:
            if seen.generation > 0 and seen.info is not None:
                self._say(f"{name} is back (pid {seen.info.pid})")
        elif starting is not None:
            if not starting.done():
                starting.set_exception(error)
        elif seen.phase is Phase.LOST:
            pause = self._backoff.pause_s(seen.failures)
            when = "at once" if pause == 0 else f"in {pause:g} s"
            self._say(f"{name} is lost ({error}); starting it again {when}")

    # ---- end -------------------------------------------------------------------------------

    async def _end(self) -> None:
        """End everything, in order: instances, driver, head, files."""
        try:
            await self._attempt(self._end_instances(), "instances")
            await self._kills.drain(_KILLS_TIMEOUT_S)
            if self._head is not None:
                await self._attempt(ray_calls.disconnect(_LEAVE_TIMEOUT_S), "driver")
                await self._head.stop(grace_s=self._grace_s)
        finally:
            self._head = None
            if self._temp_dir is not None:
                shutil.rmtree(self._temp_dir, ignore_errors=True)

    async def _end_instances(self) -> None:
        if self._control is not None:
            self._control.forget()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
            if not self._running.cancelled() and (error := self._running.exception()):
                raise error

    async def _attempt(self, step: Awaitable[None], what: str) -> None:
        """Take a step of closing; if it fails, say so and go on with the next."""
        try:
            await step
        except Exception as error:
            self._log.error("closing failed", what=what, error=repr(error))


def short_temp_dir() -> Path:
    """Make an empty folder whose name leaves room for Ray's Unix sockets."""
    base = tempfile.gettempdir()
    return Path(
        tempfile.mkdtemp(prefix="baton-", dir=base if len(base) <= _LONGEST_TEMP_DIR else "/tmp")
    )
