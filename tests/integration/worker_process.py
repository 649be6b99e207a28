"""A worker in a process of its own: `worker_process.py CONFIG_JSON`; not a test.

Prints its address as a line of JSON when it is ready, and closes at the first line on stdin.
"""

import asyncio
import json
import sys

from baton.core import log
from baton.core.config import WorkerConfig
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.prefill_worker.worker import PrefillWorker


async def main(config: WorkerConfig) -> None:
    kind = PrefillWorker if config.role is Role.PREFILL else DecodeWorker
    worker = await kind.start(config, on_progress=lambda line: None)
    async with worker:
        info = worker.info
        facts = {name: getattr(info, name) for name in ("instance_id", "address", "incarnation")}
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    log.configure()
    asyncio.run(main(WorkerConfig.model_validate_json(sys.argv[1])))
