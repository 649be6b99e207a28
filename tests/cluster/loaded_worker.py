"""A worker without a model that reports whatever load a file says, to whoever holds its lease."""

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

from baton.core.config import WorkerConfig
from baton.core.lease import Beat, Lease, Leave, Report
from baton.core.topology import InstanceInfo
from baton.proto.grpc_runtime import WorkerServer
from baton.proto.lease_service import add_lease_service
from stand_in_worker import StandIn

LOAD_FILE = "LOADED_WORKER_FILE"
"""The environment's name of the file: JSON, by role, of what a Report says."""


class Loaded(StandIn):
    """Serves its lease, and nothing else."""

    def __init__(self, info: InstanceInfo) -> None:
        super().__init__(info)
        self.incarnation = info.incarnation
        self._lease = Lease()
        self._server: WorkerServer | None = None

    @classmethod
    async def start(
        cls, config: WorkerConfig, *, on_progress: Callable[[str], None], **_: object
    ) -> Self:
        self = await super().start(config, on_progress=on_progress)
        self._server = await WorkerServer.start(
            config.host, 0, lambda server: add_lease_service(server, self)
        )
        self.info = replace(self.info, address=self._server.address)
        return self

    def beat(self, beat: Beat) -> Report:
        now = asyncio.get_running_loop().time()
        self._lease.beat(beat, now)
        load = json.loads(Path(os.environ[LOAD_FILE]).read_text()).get(self.info.role, {})
        return Report(self._lease.standing(now), epoch=beat.epoch, blocks_total=100, **load)

    def left(self, last: Beat, leave: Leave) -> None:
        pass

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()
        await super().close()
