"""A rank of an instance in a process of its own: `rank_process.py CONFIG_JSON`; not a test.

The leader starts the others itself, and prints its address and their pids as a line of JSON when
all are ready; at the first line on stdin it prints its counters and closes.
"""

import asyncio
import json
import subprocess
import sys

from baton.core import log
from baton.core.config import LeaderRef, WorkerConfig
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.executor.follower import Follower
from baton.prefill_worker.worker import PrefillWorker


async def follow(config: WorkerConfig) -> None:
    follower = await Follower.start(config, on_progress=lambda line: None)
    await follower.wait_closed()


async def lead(config: WorkerConfig) -> None:
    others: list[subprocess.Popen[bytes]] = []

    def start_others(leader: LeaderRef) -> None:
        for rank in range(1, config.parallel.size):
            other = config.model_copy(update={"rank": rank, "leader": leader})
            command = [sys.executable, __file__, other.model_dump_json()]
            others.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))

    kind = PrefillWorker if config.role is Role.PREFILL else DecodeWorker
    worker = await kind.start(config, on_progress=lambda line: None, on_listening=start_others)
    async with worker:
        info = worker.info
        facts = {name: getattr(info, name) for name in ("instance_id", "address", "incarnation")}
        facts["others"] = [other.pid for other in others]
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)
        sys.stdout.write(json.dumps(worker.stats()) + "\n")
    for other in others:
        assert other.wait(timeout=30) == 0, "a rank did not close in order"


if __name__ == "__main__":
    log.configure()
    config = WorkerConfig.model_validate_json(sys.argv[1])
    asyncio.run(lead(config) if config.rank == 0 else follow(config))
