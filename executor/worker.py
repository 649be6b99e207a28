"""What both roles share of a worker's life: load, serve, say what it is, close and check."""

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from baton.core.clock import monotonic
from baton.core.config import WorkerConfig
from baton.core.instance_events import CacheTerms
from baton.core.lease import Report, Standing
from baton.core.log import get_logger
from baton.core.metric_table import REPORTED
from baton.core.queue_age import QueueAge
from baton.core.topology import InstanceInfo, Role
from baton.executor.admission import Admission
from baton.executor.device import Device
from baton.executor.engine_loop import Listener
from baton.executor.event_feed import EventFeed
from baton.executor.gpu_start import Gpu
from baton.executor.instance import Instance
from baton.executor.leased import Leased
from baton.executor.rank_group import OnListening, nobody
from baton.kv_transfer.choose import OpenTransport, open_transport
from baton.proto.events_service import add_events_service
from baton.proto.grpc_runtime import WorkerServer
from baton.proto.lease_service import add_lease_service

L = TypeVar("L", bound=Listener)

_HEALTH_EVERY_S = 1.0

_log = get_logger("worker")


class Worker(ABC, Generic[L]):
    """One running instance; made by `start`, ended by `close`. One event loop only."""

    def __init__(self, instance: Instance, listener: L) -> None:
        self.instance = instance
        """The engine and its pool."""
        self._server: WorkerServer | None = None
        self._closing = asyncio.Event()
        self._health: asyncio.Task[None] | None = None
        self._problems: list[str] = []
        self._queue_age = QueueAge()
        self._leased = Leased(
            instance.incarnation,
            report=self.report,
            busy=lambda: instance.engine.in_step,
            fence=self.fence,
            serve=lambda: self.admission.unfence(),
            stall_s=instance.config.parallel.step_timeout_s,
        )
        self._lease_watch: asyncio.Task[None] | None = None
        self._feed = EventFeed(instance.incarnation, _terms(instance.config), instance.engine)
        self._feeding: asyncio.Task[None] | None = None

    @classmethod
    @abstractmethod
    def new_listener(cls) -> L:
        """Return who hears of the engine's steps; it is bound to the engine by __init__."""

    @abstractmethod
    def register(self, server: Any) -> None:
        """Add the role's service to a gRPC server."""

    @abstractmethod
    async def wind_down(self) -> None:
        """End what is open, fences included; no new call comes in any more."""

    @abstractmethod
    async def drain(self, deadline_s: float) -> int:
        """Admit nothing more, let what is open end, and return once nothing is; `close` follows.

        What is not done in `deadline_s` seconds others take over: its callers are told that this
        instance is draining, and go on elsewhere. Returns how much that was.
        """

    @abstractmethod
    async def fence(self) -> None:
        """Refuse what is new, end what is open, and return once all is given back."""

    @property
    @abstractmethod
    def admission(self) -> Admission:
        """Who is inside."""

    @abstractmethod
    def problems(self) -> list[str]:
        """Return what is beyond its budget, in words; none: healthy."""

    @abstractmethod
    def stats(self) -> dict[str, float | int | str]:
        """Return the instance's counters by name."""

    @abstractmethod
    def check(self) -> None:
        """Assert that the books balance and, with nothing open, that nothing is held."""

    @classmethod
    async def start(
        cls,
        config: WorkerConfig,
        *,
        on_progress: Callable[[str], None],
        on_listening: OnListening = nobody,
        open_transport: OpenTransport = open_transport,
        device: Device | None = None,
        gpu: Gpu | None = None,
    ) -> Self:
        """Load the model, open the transport, serve; raises InvalidConfig for what is not right.

        An instance of many ranks calls `on_listening` first: the others must follow it. `device` is
        where the KV pool is to lie, and `gpu` what computes, if not where and what the config says.
        """
        listener = cls.new_listener()
        instance = await Instance.load(
            config, listener, on_progress, open_transport, on_listening, device, gpu
        )
        try:
            worker = cls(instance, listener)
            worker._server = await WorkerServer.start(
                config.host, config.port, worker._register, config.tls
            )
        except BaseException:
            await instance.close()
            raise
        worker._health = asyncio.create_task(worker._watch_health(worker._server))
        worker._lease_watch = asyncio.create_task(worker._leased.watch())
        worker._lease_watch.add_done_callback(_lease_watched)
        worker._feeding = asyncio.create_task(worker._feed.run())
        on_progress(f"{config.role} instance ready at {worker._server.address}")
        return worker

    @property
    def info(self) -> InstanceInfo:
        """What this instance says of itself."""
        assert self._server is not None, "not started"
        return self.instance.info(self._server.address)

    def report(self) -> Report:
        """Return how the instance is, but for its lease."""
        roster = self.instance.engine.stats().scheduler.roster
        pool = roster.memory.pool
        return Report(
            Standing.FREE,
            draining=self.admission.draining,
            problems=tuple(self._problems),
            steps=self.instance.engine.stats().steps,
            waiting=roster.waiting,
            waited_s=self._queue_age.seen(roster.entries, roster.oldest, monotonic()),
            running=roster.running,
            open_requests=self.admission.open,
            blocks_used=pool.used,
            blocks_total=pool.total,
            stats=_reported(self.stats()),
        )

    def _register(self, server: Any) -> None:
        self.register(server)
        add_lease_service(server, self._leased)
        add_events_service(server, self._feed)

    async def close(self) -> None:
        """End open work, give everything back, and check that nothing is left."""
        self._closing.set()
        if self._lease_watch is not None:
            self._lease_watch.cancel()
            await asyncio.wait({self._lease_watch})
        self._feed.close()
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.wait({self._feeding})
        if self._health is not None:
            await self._health
        if self._server is not None:
            await self._server.close()
        try:
            await self.wind_down()
        finally:
            await self.instance.close()
        self.check()

    async def _watch_health(self, server: WorkerServer) -> None:
        """Tell whoever asks for the worker's health when a budget is passed, and when it is not."""
        while not self._closing.is_set():
            problems = self.problems()
            if bool(problems) != bool(self._problems):
                await server.set_healthy(not problems)
                _log.warning("health", healthy=not problems, problems=problems)
            self._problems = problems
            with suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_EVERY_S):
                    await self._closing.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def _reported(stats: dict[str, float | int | str]) -> dict[str, float]:
    """Return of a worker's counters those that are metrics."""
    return {name: float(stats[name]) for name in REPORTED if name in stats}


def _terms(config: WorkerConfig) -> CacheTerms:
    engine = config.engine
    hash_name = engine.prefix_hash if engine.prefix_cache else ""
    may = config.role is not Role.PREFILL and config.handover.local_prefill == "auto"
    return CacheTerms(engine.block_size, hash_name, local_prefill=may)


def _lease_watched(task: "asyncio.Task[None]") -> None:
    """Die loudly if the watch over the lease dies: an instance without it would never be fenced."""
    if not task.cancelled() and (bug := task.exception()) is not None:
        asyncio.get_running_loop().call_exception_handler(
            {"message": "the watch over the lease crashed", "exception": bug}
        )
        os._exit(70)
