"""A worker in a process of its own: `worker_process.py CONFIG_JSON [TOKENS]`; not a test.

Prints its address as a line of JSON when it is ready, and closes at the first line on stdin. With
TOKENS it is killed, as by kill -9, once it has sent so many tokens.
"""

import asyncio
import json
import os
import signal
import sys

from baton.core import log
from baton.core.config import WorkerConfig
from baton.core.topology import Role
from baton.decode_worker.outbox import Outbox
from baton.decode_worker.worker import DecodeWorker
from baton.prefill_worker.worker import PrefillWorker
from baton.proto import worker_pb2 as pb


async def main(config: WorkerConfig) -> None:
    kind = PrefillWorker if config.role is Role.PREFILL else DecodeWorker
    worker = await kind.start(config, on_progress=lambda line: None)
    async with worker:
        info = worker.info
        facts = {name: getattr(info, name) for name in ("instance_id", "address", "incarnation")}
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)


def die_after(tokens: int) -> None:
    """Let this process die when the frame with its `tokens`-th token has been written."""
    next_frame, sent = Outbox.next_frame, 0

    async def counting(outbox: Outbox) -> pb.DecodeFrame:
        nonlocal sent
        if sent >= tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        frame = await next_frame(outbox)
        sent += sum(len(update.tokens) for update in frame.updates)
        return frame

    Outbox.next_frame = counting  # type: ignore[method-assign]


if __name__ == "__main__":
    log.configure()
    if len(sys.argv) > 2:
        die_after(int(sys.argv[2]))
    asyncio.run(main(WorkerConfig.model_validate_json(sys.argv[1])))
