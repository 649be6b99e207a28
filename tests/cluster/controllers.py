"""Commands to a controller over a real Ray, whichever process it is; instances are stand-ins."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.cluster import ray_calls
from baton.cluster.controller_actor import CALLS_AT_ONCE, ControllerActor
from baton.cluster.journal import Event
from baton.cluster.names import CONTROLLER
from baton.cluster.status import InstanceStatus, Status
from baton.core.cluster_spec import ClusterSpec
from baton.core.errors import InstanceLost, Unavailable
from baton.core.topology import Role

PATIENCE_S = 120.0


def spec(prefill: int = 1, decode: int = 1, **model: Any) -> ClusterSpec:
    pools = {"prefill": {"instances": prefill}, "decode": {"instances": decode}}
    common = {"name": "none", "dir": Path("none"), "gateways": {"count": 0}}
    return ClusterSpec.checked(models=[{**common, "pools": pools, **model}], host="127.0.0.1")


class Cluster:
    """Commands to the controller, whichever process it is."""

    def __init__(self, log_dir: Path, worker: str = "stand_in_worker:StandIn") -> None:
        self.log_dir = log_dir
        self.worker = worker
        self.epoch = -1

    async def start(self) -> None:
        await ray_calls.create_service(
            ControllerActor,
            self.log_dir,
            dict.fromkeys(Role, self.worker),
            name=CONTROLLER,
            concurrency=CALLS_AT_ONCE,
            restarts=-1,
            timeout_s=30,
            beside_head=True,
        )

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Ask, as long as it takes: a controller that was killed comes back."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    actor = await ray_calls.find_actor(CONTROLLER, 30)
                except (InstanceLost, Unavailable):  # nobody yet, or Ray's head has just begun
                    await asyncio.sleep(0.1)
                    continue
                try:
                    return await ray_calls.call(
                        actor, "ask", method, *arguments, timeout_s=PATIENCE_S
                    )
                except InstanceLost:
                    await asyncio.sleep(0.1)

    async def instances(self) -> dict[str, InstanceStatus]:
        """Wait until everything is as wanted; return who is there."""
        after = 0
        async with asyncio.timeout(PATIENCE_S):
            while True:
                events, _ = await self.ask("events", after, 0.5)
                after = events[-1].number if events else after
                status: Status = await self.ask("status")
                if status.settled:
                    break
        assert status.epoch >= self.epoch, "the membership went back"
        self.epoch = status.epoch
        return {i.name: i for pool in status.pools for i in pool.instances}

    async def pid(self, *, not_: int = 0) -> int:
        """Return the controller's pid, once it is another than that."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status: Status = await self.ask("status")
                if status.controller_pid != not_:
                    return status.controller_pid
                await asyncio.sleep(0.1)

    async def gateway(self, *, not_: int) -> int:
        """Return the pid of the first gateway, once it answers and has another one than that."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status: Status = await self.ask("status")
                info = status.gateways[0].info
                if info is not None and info.pid != not_:
                    return info.pid
                await asyncio.sleep(0.1)

    async def until(self, whom: str, what: str) -> None:
        """Wait until that has happened."""
        await self.event(lambda event: (event.whom, event.what) == (whom, what))

    async def event(self, wanted: Callable[[Event], bool]) -> Event:
        """Wait for an event, perhaps one that was there already, and return it."""
        after = 0
        async with asyncio.timeout(PATIENCE_S):
            while True:
                events, _ = await self.ask("events", after, 5.0)
                for event in events:
                    if wanted(event):
                        return event
                after = events[-1].number if events else after

    def log(self, name: str) -> list[str]:
        return (self.log_dir / f"{name}.log").read_text().splitlines()

    async def whats(self, whom: str) -> list[str]:
        events, _ = await self.ask("events", 0, 0.0)
        return [event.what for event in events if event.whom == whom]
