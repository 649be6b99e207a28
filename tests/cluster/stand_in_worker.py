"""Workers without a model, for tests of the life around them."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Self

from baton.core.config import WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.ids import InstanceId, new_incarnation
from baton.core.lease import Beat, Lease, Leave, Report
from baton.core.topology import InstanceInfo
from baton.proto.grpc_runtime import WorkerServer
from baton.proto.lease_service import add_lease_service

LOAD_FILE = "STAND_IN_LOAD_FILE"
"""The environment's name of a file: JSON, by role, of what reports say."""


def log_line(text: str) -> None:
    """Write to the instance's log."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class StandIn:
    """Starts at once and does nothing."""

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info

    @classmethod
    async def start(
        cls, config: WorkerConfig, *, on_progress: Callable[[str], None], **_: object
    ) -> Self:
        on_progress("standing in")
        return cls(
            InstanceInfo(
                instance_id=InstanceId(config.instance_id),
                role=config.role,
                address="127.0.0.1:1",
                incarnation=new_incarnation(),
                pid=os.getpid(),
                model=config.model_name,
                compatibility="c",
                max_model_len=1,
                kv_tokens=1,
                max_sequences=1,
                load_s=0.0,
            )
        )

    async def drain(self, deadline_s: float) -> int:
        log_line("drained")
        return 0

    async def close(self) -> None:
        log_line("closed in order")

    def stats(self) -> dict[str, float | int | str]:
        return {"pid": os.getpid(), "omp": os.environ["OMP_NUM_THREADS"]}


class Hanging(StandIn):
    """Never gets ready."""

    @classmethod
    async def start(
        cls, config: WorkerConfig, *, on_progress: Callable[[str], None], **_: object
    ) -> Self:
        on_progress("hanging")
        log_line("a line in the log")
        await asyncio.Event().wait()
        raise AssertionError


class Refusing(StandIn):
    """Refuses its config."""

    @classmethod
    async def start(
        cls, config: WorkerConfig, *, on_progress: Callable[[str], None], **_: object
    ) -> Self:
        raise InvalidConfig("kv_memory_mib", 7, "8 or more")


class Crashing(StandIn):
    """Its process ends while it starts."""

    @classmethod
    async def start(
        cls, config: WorkerConfig, *, on_progress: Callable[[str], None], **_: object
    ) -> Self:
        on_progress("about to crash")
        log_line("last words")
        os._exit(3)


class Failing(StandIn):
    """Raises an error that is not Baton's."""

    @classmethod
    async def start(
        cls, config: WorkerConfig, *, on_progress: Callable[[str], None], **_: object
    ) -> Self:
        raise ValueError("no luck")


class Loaded(StandIn):
    """Serves its lease, and reports whatever load a file says."""

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
            config.host, 0, lambda server: add_lease_service(server, self), config.tls
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
