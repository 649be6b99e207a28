"""Baton's cluster on one machine: a Ray head of our own, and the instances that it hosts."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from baton.cluster import ray_calls
from baton.cluster.instance import Instance, Place
from baton.cluster.ray_head import RayHead
from baton.cluster.reconcile import (
    Backoff,
    Desired,
    Fleet,
    Start,
    became_ready,
    begun,
    membership_of,
    missing,
    reconcile,
    was_lost,
)
from baton.core.clock import Clock, monotonic
from baton.core.config import ClusterConfig, ParallelConfig, WorkerConfig
from baton.core.errors import BatonError, InstanceLost
from baton.core.ids import InstanceId
from baton.core.log import get_logger
from baton.core.tasks import TaskSet
from baton.core.topology import InstanceInfo, MembershipBoard, Role

FACTORIES: Mapping[Role, str] = {
    Role.PREFILL: "baton.prefill_worker.worker:PrefillWorker",
    Role.DECODE: "baton.decode_worker.worker:DecodeWorker",
    Role.MIXED: "baton.decode_worker.worker:DecodeWorker",
}
"""The class that does each role's work, by name: its libraries are for the instance's process."""
_HEAD_TIMEOUT_S = 60.0
_JOIN_TIMEOUT_S = 30.0
_PLACE_TIMEOUT_S = 30.0
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
        self.board = MembershipBoard()
        """Who is ready; one event loop only."""
        self._config = config
        self._handover = config.handover.with_secret()  # one for all, restarted ones too
        self._say = on_progress
        self._factories = factories
        self._backoff = backoff
        self._clock = clock
        self._grace_s = grace_s
        self._desired = desired_instances(config)
        self._fleet: Fleet = {}
        self._instances: dict[InstanceId, Instance] = {}
        self._losses = 0
        self._changed = asyncio.Event()
        self._all_ready: asyncio.Future[None] | None = None
        self._control: asyncio.Task[None] | None = None
        self._kills = TaskSet()
        self._head: RayHead | None = None
        self._places: ray_calls.Places | None = None
        self._temp_dir: Path | None = None
        self._log = get_logger("cluster")

    def __repr__(self) -> str:
        phases = ", ".join(f"{name} {seen.phase}" for name, seen in self._fleet.items())
        return f"LocalCluster({phases or 'not started'})"

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
    def temp_dir(self) -> Path:
        """Logs of Ray and of the instances (<instance>.log); removed at the end."""
        assert self._temp_dir is not None, "not started"
        return self._temp_dir

    def processes(self) -> tuple[int, ...]:
        """Return the pids of all that was started: Ray's and the instances'."""
        return tuple(self._head.members()) if self._head else ()

    async def watch(self) -> None:
        """Wait for as long as the cluster is looked after; raises what ends that."""
        assert self._control is not None, "not started"
        assert self._head is not None, "not started"
        head = asyncio.create_task(self._head.ended())
        try:
            await asyncio.wait({self._control, head}, return_when=asyncio.FIRST_COMPLETED)
            for task in (self._control, head):
                if task.done():
                    task.result()
        finally:
            head.cancel()

    def hurry(self) -> None:
        """Let everything that is being closed have no more time."""
        self._grace_s = 0.0
        for instance in self._instances.values():
            self._kills.start(instance.kill())

    def stats(self) -> ClusterStats:
        """Return what is there now."""
        ready = len(self.board.current.instances)
        return ClusterStats(ready, len(self._desired), self._losses, self.board.current.version)

    def check(self) -> None:
        """Assert that the membership is what the fleet says."""
        version = self.board.current.version
        assert self.board.current == membership_of(self._fleet, version), "membership is stale"
        wanted = {want.instance_id for want in self._desired}
        assert set(self._fleet) <= wanted, "an instance that nobody wants"

    async def instance_stats(self, name: InstanceId) -> dict[str, float | int | str]:
        """Return one instance's counters; raises InstanceLost if it is not there."""
        instance = self._instances.get(name)
        if instance is None:
            raise InstanceLost(f"{name} is not running")
        return await instance.stats(_PLACE_TIMEOUT_S)

    async def rank_stats(self, name: InstanceId) -> list[dict[str, float | int | str]]:
        """Return the counters of all ranks of an instance; InstanceLost if it is not there."""
        instance = self._instances.get(name)
        if instance is None:
            raise InstanceLost(f"{name} is not running")
        return await instance.rank_stats(_PLACE_TIMEOUT_S)

    # ---- start -----------------------------------------------------------------------------

    async def _start(self) -> None:
        sizes = self._place_sizes(self._desired)
        self._temp_dir = _short_temp_dir()
        self._say("starting Ray")
        self._head = await RayHead.start(
            self._temp_dir,
            slots=sum(sizes),
            environment=ray_calls.head_environment(self._config.threads),
            timeout_s=_HEAD_TIMEOUT_S,
        )
        await ray_calls.connect(self._head.address, _JOIN_TIMEOUT_S)
        self._places = await ray_calls.reserve_places(sizes, _PLACE_TIMEOUT_S)
        names = ", ".join(want.instance_id for want in self._desired)
        self._say(f"Ray is up (pid {self._head.pid}); starting {names}")
        self._all_ready = asyncio.get_running_loop().create_future()
        self._control = asyncio.create_task(self._keep_desired())
        await self._until_ready(self._all_ready, self._control)

    async def _until_ready(
        self, ready: "asyncio.Future[None]", control: "asyncio.Task[None]"
    ) -> None:
        """Wait for all; each instance has a deadline of its own, so this ends."""
        done, _ = await asyncio.wait({ready, control}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    # ---- keep what is desired ---------------------------------------------------------------

    async def _keep_desired(self) -> None:
        async with asyncio.TaskGroup() as lives:
            while True:
                now = self._clock()
                plan = reconcile(self._desired, self._fleet, now, self._backoff)
                for start in plan.starts:
                    self._fleet = begun(self._fleet, start, now)
                    lives.create_task(self._live(start))
                await self._woken(plan.ask_again_at)

    async def _woken(self, at: float | None) -> None:
        """Wait for news, or until the clock says `at`."""
        try:
            async with asyncio.timeout(None if at is None else max(0.0, at - self._clock())):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def _live(self, start: Start) -> None:
        """One life of one instance, from its start to its end; reports both."""
        assert self._places is not None, "no places are reserved"
        name = start.desired.instance_id
        instance = Instance(
            self._worker_config(start),
            self.temp_dir / f"{name}.log",
            lambda line: self._say(f"{name}: {line}"),
        )
        self._instances[name] = instance
        try:
            info = await instance.start(
                self._factories[start.desired.role],
                self._place(self._places, start.desired),
                self._config.start_timeout_s,
            )
            self._ready(start, info)
            await instance.ended()
        except BatonError as error:
            self._lost(start, error)
        finally:
            await self._finish(instance)

    async def _finish(self, instance: Instance) -> None:
        try:
            await instance.close(self._grace_s)
        except BatonError as error:
            self._log.info("not closed in order", instance=repr(instance), error=str(error))

    def _ready(self, start: Start, info: InstanceInfo) -> None:
        self._fleet = became_ready(self._fleet, start, info, self._clock())
        self._publish()
        if start.generation > 0:
            self._say(f"{info.instance_id} is back (pid {info.pid})")
        waiting = self._all_ready
        if waiting and not waiting.done() and not missing(self._desired, self._fleet):
            waiting.set_result(None)

    def _lost(self, start: Start, error: BatonError) -> None:
        name = start.desired.instance_id
        if name not in self._fleet:
            return  # the cluster is closing
        self._instances.pop(name, None)
        self._fleet = was_lost(self._fleet, start, self._clock(), self._backoff)
        self._losses += 1
        self._publish()
        if self._all_ready and not self._all_ready.done():
            self._all_ready.set_exception(error)  # while starting up, a failure is an answer
        else:
            pause = self._backoff.pause_s(self._fleet[name].failures)
            when = "at once" if pause == 0 else f"in {pause:g} s"
            self._say(f"{name} is lost ({error}); starting it again {when}")
            self._log.warning("instance lost", instance=name, error=str(error))

    def _publish(self) -> None:
        """Bring the board up to date, and let the control loop look again."""
        newer = membership_of(self._fleet, self.board.current.version + 1)
        if newer.instances != self.board.current.instances:
            self.board.publish(newer)
        self._changed.set()

    def _worker_config(self, start: Start) -> WorkerConfig:
        config = self._config
        return WorkerConfig(
            instance_id=start.desired.instance_id,
            role=start.desired.role,
            model_dir=config.model_dir,
            model_name=config.model_name,
            host=config.host,
            threads=config.threads,
            parallel=self._parallel(start.desired),
            engine=config.engine_of(start.desired.role),
            handover=self._handover,
        )

    def _parallel(self, desired: Desired) -> ParallelConfig:
        config = self._config
        prefill = desired.role is Role.PREFILL
        return config.prefill_parallel if prefill else config.decode_parallel

    def _place_sizes(self, instances: Sequence[Desired]) -> list[int]:
        return [size for want in instances for size in Place.sizes(self._parallel(want))]

    def _place(self, places: ray_calls.Places, desired: Desired) -> Place:
        before = self._desired[: self._desired.index(desired)]
        return Place(places, len(self._place_sizes(before)))

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
        self._fleet = {}
        self._publish()
        if self._control is not None:
            self._control.cancel()
            await asyncio.wait({self._control})
            if not self._control.cancelled() and (error := self._control.exception()):
                raise error

    async def _attempt(self, step: Awaitable[None], what: str) -> None:
        """Take a step of closing; if it fails, say so and go on with the next."""
        try:
            await step
        except Exception as error:
            self._log.error("closing failed", what=what, error=repr(error))


def desired_instances(config: ClusterConfig) -> tuple[Desired, ...]:
    """Return the instances that a config asks for; without prefill, decode does both."""
    role = Role.DECODE if config.prefill else Role.MIXED
    prefill = tuple(
        Desired(InstanceId(f"prefill-{i}"), Role.PREFILL) for i in range(config.prefill)
    )
    decode = tuple(Desired(InstanceId(f"{role.value}-{i}"), role) for i in range(config.decode))
    return prefill + decode


def _short_temp_dir() -> Path:
    """Make an empty folder whose name leaves room for Ray's Unix sockets."""
    base = tempfile.gettempdir()
    return Path(
        tempfile.mkdtemp(prefix="baton-", dir=base if len(base) <= _LONGEST_TEMP_DIR else "/tmp")
    )
