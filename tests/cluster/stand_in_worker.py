"""Workers without a model, for tests of the life around them."""

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Self

from baton.core.config import WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.ids import InstanceId, new_incarnation
from baton.core.topology import InstanceInfo


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
