"""A rank of an instance in a process of its own: `rank_process.py CONFIG_JSON [late]`; not a test.

The leader starts the others itself, and prints its address and their pids as a line of JSON when
all are ready; at the first line on stdin it prints its counters and closes. With `late` every rank
computes as on a GPU, on a queue and a pool of its own that are late.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from baton.core import log
from baton.core.config import LeaderRef, WorkerConfig
from baton.core.memory import MIB
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.executor.follower import Follower
from baton.executor.gpu_start import Gpu
from baton.executor.late_device import LateDevice
from baton.executor.late_queue import LateQueue
from baton.prefill_worker.worker import PrefillWorker


class Room:
    """A device with room."""

    def total(self) -> int:
        return 152 * MIB

    def used(self) -> int:
        return 8 * MIB

    def peak(self, work: Callable[[], None]) -> int:
        work()
        return 0


@contextmanager
def late_gpu(rank: int, wanted: Sequence[str]) -> Iterator[Gpu | None]:
    """A device that is late in all it does, if wanted; at the end nothing of it is held."""
    if not wanted:
        yield None
        return
    with closing(LateQueue()) as queue:
        pool = LateDevice(seed=rank, shared=False)
        yield Gpu(queue, Room(), pool)
    pool.check()


async def follow(config: WorkerConfig, options: Sequence[str]) -> None:
    with late_gpu(config.rank, options) as gpu:
        follower = await Follower.start(config, on_progress=lambda line: None, gpu=gpu)
        await follower.wait_closed()


async def lead(config: WorkerConfig, options: Sequence[str]) -> None:
    others: list[subprocess.Popen[bytes]] = []

    def start_others(leader: LeaderRef) -> None:
        for rank in range(1, config.parallel.size):
            other = config.model_copy(update={"rank": rank, "leader": leader})
            command = [sys.executable, __file__, other.model_dump_json(), *options]
            others.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))

    kind = PrefillWorker if config.role is Role.PREFILL else DecodeWorker
    with late_gpu(0, options) as gpu:
        worker = await kind.start(
            config, on_progress=lambda line: None, on_listening=start_others, gpu=gpu
        )
        async with worker:
            info = worker.info
            facts = {
                name: getattr(info, name) for name in ("instance_id", "address", "incarnation")
            }
            facts["others"] = [other.pid for other in others]
            sys.stdout.write(json.dumps(facts) + "\n")
            sys.stdout.flush()
            await asyncio.to_thread(sys.stdin.readline)
            sys.stdout.write(json.dumps(worker.stats()) + "\n")
    for other in others:
        assert other.wait(timeout=30) == 0, "a rank did not close in order"


if __name__ == "__main__":
    log.configure()
    config, options = WorkerConfig.model_validate_json(sys.argv[1]), sys.argv[2:]
    asyncio.run(lead(config, options) if config.rank == 0 else follow(config, options))
