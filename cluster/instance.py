"""One life of one instance, seen from the driver: start all its ranks, notice an end, close it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.cluster import ray_calls
from baton.cluster.rank_process import RankProcess, drop
from baton.core.config import LeaderRef, ParallelConfig, WorkerConfig
from baton.core.errors import InstanceLost
from baton.core.topology import InstanceInfo

FOLLOWER = "baton.executor.follower:Follower"
"""What every rank hosts but the leader."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an instance runs: one place, on one node, for each of its stages."""

    group: ray_calls.Places
    index: int
    """Of the first stage's place."""

    @staticmethod
    def sizes(parallel: ParallelConfig) -> list[int]:
        """Return the ranks in each place that an instance needs."""
        return [parallel.stage_size] * parallel.pp


class Instance:
    """The processes of an instance; `start` it once, and always `close` it.

    They live and die together: the end of one is the end of all.
    """

    def __init__(
        self, config: WorkerConfig, log_path: Path, on_progress: Callable[[str], None]
    ) -> None:
        """The leader's log is `log_path`, and that of rank 1 beside it, with `.rank1` added."""
        self._config = config
        self._ranks = [
            RankProcess(
                config.instance_id if rank == 0 else f"rank {rank} of {config.instance_id}",
                log_path if rank == 0 else log_path.with_suffix(f".rank{rank}{log_path.suffix}"),
                on_progress if rank == 0 else _unheard,
            )
            for rank in range(config.parallel.size)
        ]
        self._ready = False
        self._closing = False

    def __repr__(self) -> str:
        return f"Instance({self._config.instance_id}, ready={self._ready})"

    async def start(self, factory: str, place: Place, timeout_s: float) -> InstanceInfo:
        """Start all processes, the leader with the worker class `factory`; return once ready.

        Raises as RankProcess.start does, of whichever rank fails first.
        """
        stage = self._config.parallel.stage_size
        for rank, process in enumerate(self._ranks):
            await process.create(place.group, place.index + rank // stage)
        leading = asyncio.create_task(self._ranks[0].start(factory, self._config, timeout_s))
        following = asyncio.create_task(self._start_others(timeout_s))
        try:
            await _first_error(leading, following)
            info: InstanceInfo = leading.result()
        finally:
            await drop(leading)
            await drop(following)
        self._ready = True
        return info

    async def ended(self) -> None:
        """Wait until a process or the worker has ended, or hangs; raises InstanceLost then."""
        waits = [asyncio.create_task(process.ended()) for process in self._ranks]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            rank = waits.index(next(iter(done)))
            try:
                waits[rank].result()
            except InstanceLost as error:
                raise InstanceLost(f"rank {rank}: {error}" if rank else str(error)) from None
        finally:
            self._ready = False
            for wait in waits:
                await drop(wait)

    async def stats(self, timeout_s: float) -> dict[str, float | int | str]:
        """Return the worker's counters."""
        return await self._ranks[0].stats(timeout_s)

    async def rank_stats(self, timeout_s: float) -> list[dict[str, float | int | str]]:
        """Return the counters of every rank, the leader's first."""
        return [await process.stats(timeout_s) for process in self._ranks]

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

    async def _start_others(self, timeout_s: float) -> None:
        if len(self._ranks) == 1:
            return
        leader = await self._ranks[0].leader(timeout_s)
        if leader is None:
            return  # the leader's own start says why
        others = [
            asyncio.create_task(process.start(FOLLOWER, self._following(leader, rank), timeout_s))
            for rank, process in enumerate(self._ranks)
            if rank
        ]
        try:
            await _first_error(*others)
        finally:
            for other in others:
                await drop(other)

    def _following(self, leader: LeaderRef, rank: int) -> WorkerConfig:
        return self._config.model_copy(update={"leader": leader, "rank": rank})


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
