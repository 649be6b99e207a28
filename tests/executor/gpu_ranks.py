"""An instance whose ranks compute on GPUs, or with a late queue in place of CUDA, each a process.

It imports no test library: the ranks' processes run it.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch

from baton.core.config import LeaderRef, WorkerConfig
from baton.core.memory import MIB
from baton.core.request import GenerateRequest
from baton.engine.step import EngineEvent, StepPlan, TokenSampled
from baton.executor.follower import Follower
from baton.executor.gpu_start import Gpu
from baton.executor.instance import Instance
from baton.executor.late_queue import LateQueue
from baton.parallel.group import Group, Ranks
from baton.parallel.mesh import Place

PATIENCE_S = 50.0


@dataclass(frozen=True)
class Room:
    """A device of `total` MiB, of which a tenth is in use."""

    mib: int

    def total(self) -> int:
        return self.mib * MIB

    def used(self) -> int:
        return self.mib * MIB // 10

    def peak(self, work: Callable[[], None]) -> int:
        work()
        return 0


@dataclass
class Served:
    """What one rank tells at the end."""

    replays: int
    said: list[str]
    tokens: list[list[int]] = field(default_factory=list)
    """By request; the leader's."""
    failure: str = ""


def serve(
    ranks: Ranks,
    place: Place,
    config: str,
    requests: Sequence[GenerateRequest],
    mib: Sequence[int] | None,
) -> Served:
    """Be a rank of the instance until all requests are served.

    `mib` is the memory of each rank's stand-in for a device; None: they have GPUs. One axis of the
    mesh has several ranks at most.
    """
    line = _line(ranks)
    given, said = WorkerConfig.model_validate_json(config), list[str]()
    with closing(LateQueue()) as queue:
        gpu = None if mib is None else Gpu(queue, Room(mib[line.rank]), None)
        if line.rank == 0:
            served = asyncio.run(_lead(line, given, requests, gpu, said))
        else:
            served = asyncio.run(_follow(line, given, gpu, said))
        served.replays = queue.replays
    return served


def _line(ranks: Ranks) -> Group:
    """Return the group of all ranks of a mesh of one axis."""
    groups = (ranks.pp, ranks.ep, ranks.cp, ranks.tp)
    return next((group for group in groups if group.size > 1), ranks.tp)


async def _lead(
    line: Group,
    config: WorkerConfig,
    requests: Sequence[GenerateRequest],
    gpu: Gpu | None,
    said: list[str],
) -> Served:
    def tell(leader: LeaderRef) -> None:
        line.broadcast_(torch.tensor([leader.port, leader.incarnation]), 0)

    ears = _Ears(len(requests))
    instance = await Instance.load(config, ears, said.append, on_listening=tell, gpu=gpu)
    try:
        ids = [instance.engine.submit(request) for request in requests]
        async with asyncio.timeout(PATIENCE_S):
            await ears.done.wait()
            await instance.engine.idle()
        instance.check(idle=True)
    finally:
        await instance.close()
    return Served(0, said, [ears.tokens.get(seq_id, []) for seq_id in ids], ears.failure)


async def _follow(line: Group, config: WorkerConfig, gpu: Gpu | None, said: list[str]) -> Served:
    port, incarnation = line.broadcast_(torch.zeros(2, dtype=torch.int64), 0).tolist()
    leader = LeaderRef(host="127.0.0.1", port=port, incarnation=incarnation)
    own = config.model_copy(update={"rank": line.rank, "leader": leader})
    follower = await Follower.start(own, on_progress=said.append, gpu=gpu)
    async with asyncio.timeout(PATIENCE_S):
        await follower.wait_closed()
    return Served(0, said)


class _Ears:
    """Hears of tokens."""

    def __init__(self, requests: int) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.done = asyncio.Event()
        self.failure = ""
        self._open = requests

    def step_started(self, plan: StepPlan) -> tuple[int, ...]:
        return ()

    def layers_done(self, plan: StepPlan, layers: int) -> None:
        raise AssertionError("nobody asked for layers")

    def step_ran(self, plan: StepPlan, seconds: float) -> None:
        pass

    def step_done(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, TokenSampled):
                self.tokens.setdefault(event.seq_id, []).append(event.token)
                self._end(event.finish is not None)

    def step_failed(self, seq_ids: Sequence[int], error: Exception) -> None:
        self.failure = str(error)
        self._end(len(seq_ids))

    def _end(self, count: int) -> None:
        self._open -= count
        if not self._open:
            self.done.set()
