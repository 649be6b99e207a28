"""One life of one instance, seen from the driver: start all its ranks, notice an end, close it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.cluster import ray_calls
from baton.cluster.rank_process import RankProcess, drop
from baton.core.cluster_spec import RankResources
from baton.core.config import LeaderRef, WorkerConfig
from baton.core.errors import InstanceLost
from baton.core.ids import InstanceId
from baton.core.topology import InstanceInfo

FOLLOWER = "baton.executor.follower:Follower"
"""What every rank hosts but the leader."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an instance runs."""

    group: ray_calls.Places
    """One place for each of its stages."""
    hosts: tuple[str, ...]
    """The address on which the ranks of each stage listen."""
    resources: RankResources
    """What each rank takes."""
    actors: str | None
    """Rank r is to be known to Ray as <actors>.<r>, and to outlive this process; None: neither."""


class Instance:
    """The processes of an instance; `start` it once, and always `close` it.

    They live and die together: the end of one is the end of all.
    """

    def __init__(
        self,
        name: InstanceId,
        ranks: int,
        log_path: Path,
        on_progress: Callable[[str], None],
    ) -> None:
        """The leader's log is `log_path`, and that of rank 1 beside it, with `.rank1` added."""
        self._name = name
        self._ranks = [
            RankProcess(
                name if rank == 0 else f"rank {rank} of {name}",
                log_path if rank == 0 else log_path.with_suffix(f".rank{rank}{log_path.suffix}"),
                on_progress if rank == 0 else _unheard,
            )
            for rank in range(ranks)
        ]
        self._given_up: asyncio.Future[None] | None = None
        """Ends `ended`, while that waits."""
        self._ready = False
        self._closing = False

    def __repr__(self) -> str:
        return f"Instance({self._name}, ready={self._ready})"

    async def start(
        self, factory: str, config: WorkerConfig, place: Place, timeout_s: float
    ) -> InstanceInfo:
        """Start all processes, the leader with the worker class `factory`; return once ready.

        Raises as RankProcess.start does, of whichever rank fails first.
        """
        plan = [self._config_of(rank, config, place) for rank in range(len(self._ranks))]
        for rank, process in enumerate(self._ranks):
            name = None if place.actors is None else f"{place.actors}.{rank}"
            stage = rank // config.parallel.stage_size
            await process.create(place.group, stage, place.resources, name)
        leading = asyncio.create_task(self._ranks[0].start(factory, plan[0], timeout_s))
        following = asyncio.create_task(self._start_others(plan, timeout_s))
        try:
            await _first_error(leading, following)
            info: InstanceInfo = leading.result()
        finally:
            await drop(leading)
            await drop(following)
        self._ready = True
        return info

    async def adopt(self, actors: str, timeout_s: float) -> InstanceInfo:
        """Take over the processes of that name; return what the leader says once it is ready.

        Raises InstanceLost if any is gone, or did not start; `kill` those that are left then.
        """
        found = await asyncio.gather(
            *(process.find(f"{actors}.{rank}") for rank, process in enumerate(self._ranks)),
            return_exceptions=True,  # those that are found must be known, to be killed
        )
        for error in found:
            if error is not None:
                raise error
        info: InstanceInfo = await self._ranks[0].started(timeout_s)
        self._ready = True
        return info

    async def ended(self) -> None:
        """Wait until a process or the worker has ended, or hangs; raises InstanceLost then."""
        waits = [asyncio.create_task(process.ended()) for process in self._ranks]
        given_up = self._given_up = asyncio.get_running_loop().create_future()
        anything: list[asyncio.Future[None]] = [*waits, given_up]
        self._ready = True
        try:
            done, _ = await asyncio.wait(anything, return_when=asyncio.FIRST_COMPLETED)
            self._ready = False  # but not if we are cancelled: then it can close in order
            if given_up in done:
                given_up.result()
            rank = anything.index(next(iter(done)))
            try:
                waits[rank].result()
            except InstanceLost as error:
                raise InstanceLost(f"rank {rank}: {error}" if rank else str(error)) from None
        finally:
            for wait in anything:
                await drop(wait)

    def give_up(self, error: InstanceLost) -> None:
        """Let `ended` raise this: nobody answers there, whatever Ray says of its processes."""
        if self._given_up is not None and not self._given_up.done():
            self._given_up.set_exception(error)

    async def stats(self, timeout_s: float) -> dict[str, float | int | str]:
        """Return the worker's counters."""
        return await self._ranks[0].stats(timeout_s)

    async def rank_stats(self, timeout_s: float) -> list[dict[str, float | int | str]]:
        """Return the counters of every rank, the leader's first."""
        return [await process.stats(timeout_s) for process in self._ranks]

    async def drain(self, deadline_s: float) -> None:
        """Let it take no more requests, and end or move those that are open."""
        await self._ranks[0].drain(deadline_s)

    async def kill_named(self, actors: str) -> None:
        """End at once what is left of the processes of that name."""
        if actors:
            await asyncio.gather(
                *(process.find(f"{actors}.{rank}") for rank, process in enumerate(self._ranks)),
                return_exceptions=True,  # those that are gone need no end
            )
            await self.kill()

    async def kill(self) -> None:
        """End its processes at once."""
        await asyncio.gather(*(process.kill() for process in self._ranks))

    async def close(self, grace_s: float) -> None:
        """Close the worker within `grace_s`, then end its processes, whatever happened."""
        if self._closing:
            return
        self._closing = True
        try:
            if grace_s > 0 and self._ready:
                await self._ranks[0].close(grace_s)  # which closes the other ranks
        finally:
            await self.kill()

    async def _start_others(self, plan: list[WorkerConfig], timeout_s: float) -> None:
        if len(self._ranks) == 1:
            return
        leader = await self._ranks[0].leader(timeout_s)
        if leader is None:
            return  # the leader's own start says why
        others = [
            asyncio.create_task(process.start(FOLLOWER, _following(leader, plan[rank]), timeout_s))
            for rank, process in enumerate(self._ranks)
            if rank
        ]
        try:
            await _first_error(*others)
        finally:
            for other in others:
                await drop(other)

    def _config_of(self, rank: int, config: WorkerConfig, place: Place) -> WorkerConfig:
        host = place.hosts[rank // config.parallel.stage_size]
        return config.model_copy(update={"rank": rank, "host": host})


def _following(leader: LeaderRef, config: WorkerConfig) -> WorkerConfig:
    return config.model_copy(update={"leader": leader})


async def _first_error(*tasks: "asyncio.Task[Any]") -> None:
    """Wait for all; raise the first error as soon as there is one."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    errors = [error for task in done if (error := task.exception()) is not None]
    # A rank that ends takes the others along: who says why comes before who lost somebody.
    errors.sort(key=lambda error: isinstance(error, InstanceLost))
    if errors:
        raise errors[0]


def _unheard(line: str) -> None:
    """Leave a line to the log alone."""
