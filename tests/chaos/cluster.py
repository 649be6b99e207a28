"""The processes of one world: two decode and two prefill instances, each behind a link."""

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from baton.core.config import EngineConfig, HandoverConfig, WorkerConfig
from baton.core.ids import Incarnation, InstanceId
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role

from .gateway import open_gateway
from .link import Link
from .process import PATIENCE_S, Told, WorkerProcess
from .schedule import DECODES, MODEL_DIR, PREFILLS, World, catalogue

_NAMES = (
    *(f"decode-{index}" for index in range(DECODES)),
    *(f"prefill-{index}" for index in range(PREFILLS)),
)
_NOWHERE = "127.0.0.1:1"

_DEADLINES = {
    "accept_timeout_s": 0.6,
    "offer_timeout_s": 1.5,
    "read_timeout_s": 0.5,
    "room_timeout_s": 3.0,
}
"""Short, so that a run sees them pass; too short on a busy machine only means more fallbacks."""


class Cluster:
    """Made by `start`, ended by `close` or, after a failure, by `kill`."""

    def __init__(self, world: World, folder: Path, told: Told) -> None:
        self.world = world
        self.links = [Link() for _ in _NAMES]
        """One to each process."""
        self.processes: list[WorkerProcess] = []
        """All that live: the decode, then the prefill instances."""
        self.board = MembershipBoard()
        self._folder = folder
        self._told = told
        self._lives = itertools.count(1)

    @classmethod
    async def start(cls, world: World, folder: Path, told: Told) -> "Cluster":
        """Start all processes; `told` hears what happens in them, with their `name`."""
        cluster = cls(world, folder, told)
        for link in cluster.links:
            await link.start()
        starting = [asyncio.create_task(cluster._process(name)) for name in _NAMES]
        await asyncio.wait(starting)
        failed = [task.exception() for task in starting if task.exception()]
        cluster.processes = [task.result() for task in starting if not task.exception()]
        if failed:
            await cluster.kill()
            raise AssertionError(f"a worker did not start; see {folder}") from failed[0]
        cluster._publish()
        return cluster

    @property
    def decodes(self) -> list[WorkerProcess]:
        """The decode instances."""
        return self.processes[:DECODES]

    @property
    def prefills(self) -> list[WorkerProcess]:
        """The prefill instances."""
        return self.processes[DECODES:]

    def link_to(self, process: WorkerProcess) -> Link:
        """Return what lies between a process and those that call it."""
        return self.links[self.processes.index(process)]

    def prefill(self, index: int) -> InstanceInfo:
        """Return a prefill instance as it is called now; -1 is one that is not there."""
        info = self._info(DECODES + max(index, 0))
        if index >= 0:
            return info
        return replace(
            info,
            instance_id=InstanceId("prefill-9"),
            address=_NOWHERE,
            incarnation=Incarnation(9),
        )

    async def replace(self, process: WorkerProcess, *, gently: bool = False) -> WorkerProcess:
        """Kill a process, or close it, and start it anew under its name, as another incarnation."""
        place = self.processes.index(process)
        await (process.close() if gently else process.kill())
        reborn = self.processes[place] = await self._process(_NAMES[place])
        self._publish()
        return reborn

    def _publish(self) -> None:
        """Tell the gateways who is there, as a control plane does."""
        for link, process in zip(self.links, self.processes, strict=True):
            link.upstream = process.info.address
        instances = tuple(map(self._info, range(len(_NAMES))))
        self.board.publish(Membership(self.board.current.version + 1, instances))

    def _info(self, place: int) -> InstanceInfo:
        return replace(self.processes[place].info, address=self.links[place].address)

    async def close(self) -> None:
        """Close everything in good order; fails if a process still holds something."""
        try:
            await asyncio.gather(*(process.close() for process in self.processes))
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End everything by force. Safe to repeat."""
        await asyncio.gather(*(process.kill() for process in self.processes))
        for link in self.links:
            await link.close()

    async def _process(self, name: str) -> WorkerProcess:
        config = _config(self.world, name)
        log_path = self._folder / f"{name}.{next(self._lives)}.log"

        def told(message: dict[str, Any]) -> None:
            self._told({"name": name, **message})

        return await WorkerProcess.start(config, told, log_path)


def _config(world: World, name: str) -> WorkerConfig:
    prefill = name.startswith("prefill")
    engine = EngineConfig(
        block_size=world.block_size,
        kv_memory_mib=world.prefill_mib if prefill else world.decode_mib,
        max_batch_tokens=world.chunk if prefill else 256,
        max_waiting=world.prefill_waiting if prefill else 256,
        host_memory_mib=0 if prefill else world.swap_mib,
        policy="fcfs" if prefill else world.policy,
        prefix_cache=world.prefill_cache if prefill else world.decode_cache,
    )
    handover = HandoverConfig(
        **_DEADLINES,
        received_timeout_s=world.prefill_keeps_s,
        local_prefill=world.local_prefill,
        min_read_kib=world.min_read_kib,
        transport=world.transport,
        backup="off" if prefill else world.backup,
        backup_every_blocks=1,
        backup_round_blocks=4,
        secret=SecretStr("of all processes in tests/chaos"),
    )
    return WorkerConfig(
        instance_id=name,
        role=Role.PREFILL if prefill else Role.DECODE,
        model_dir=MODEL_DIR,
        model_name="model",
        engine=engine,
        handover=handover,
    )


async def right_answers(folder: Path) -> list[list[int]]:
    """Return the tokens of each entry of the catalogue, from one process without faults."""
    config = WorkerConfig(
        instance_id="reference",
        role=Role.DECODE,
        model_dir=MODEL_DIR,
        model_name="model",
        engine=EngineConfig(kv_memory_mib=64, prefix_cache=False),
    )
    process = await WorkerProcess.start(config, lambda _: None, folder / "reference.log")
    board = MembershipBoard(Membership(1, (process.info,)))
    async with open_gateway(board, lambda _: None) as gateway:
        answers = [gateway.submit(entry, ()) for entry in catalogue()]
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(answer.done.wait() for answer in answers))
    await process.close()
    assert all(answer.finish and answer.finish.reason == "length" for answer in answers), answers
    return [answer.tokens for answer in answers]
