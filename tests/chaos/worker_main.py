"""A worker in a process of its own, with faults that wait in it; not a test.

test ── {"do": "arm", "faults": […]}, {"do": "stats"}, {"do": "close"} ──▶ worker
test ◀─ the worker's facts once it is ready; then {"event": …}, {"struck": …}, {"stats": …}
"""

import asyncio
import faulthandler
import os
import sys
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from baton.core import log
from baton.core.config import HandoverConfig, WorkerConfig
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.kv_transfer.choose import open_transport
from baton.kv_transfer.transport import Region, Transport
from baton.prefill_worker.worker import PrefillWorker

from .armed import Armed
from .faulty_prefill import make_faulty
from .faulty_transport import FaultyTransport
from .schedule import Fault


def main(config_json: str, pipe: Connection, log_path: Path) -> None:
    """Run one worker until it is told to close, or whoever started it is gone."""
    with log_path.open("ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    faulthandler.enable()
    log.configure()
    asyncio.run(_serve(WorkerConfig.model_validate_json(config_json), pipe))


async def _serve(config: WorkerConfig, pipe: Connection) -> None:
    armed = Armed(pipe.send)
    kind = PrefillWorker if config.role is Role.PREFILL else DecodeWorker
    worker: Any = await kind.start(
        config, on_progress=_quiet, open_transport=partial(_open_faulty, armed)
    )
    if config.role is Role.PREFILL:
        make_faulty(worker, armed)
    async with worker:
        pipe.send(asdict(worker.info))
        while (command := await asyncio.to_thread(_receive, pipe))["do"] != "close":
            if command["do"] == "arm":
                armed.arm([Fault(**fault) for fault in command["faults"]])
            else:
                pipe.send({"stats": worker.stats(), "problem": _problem(worker)})
    pipe.send({"closed": True})


def _problem(worker: Any) -> str:
    try:
        worker.check()
    except AssertionError as error:
        return f"check() fails: {error}"
    return ""


async def _open_faulty(
    armed: Armed, region: Region, config: HandoverConfig, **who: Any
) -> Transport:
    return FaultyTransport(await open_transport(region, config, **who), region, armed)


def _receive(pipe: Connection) -> dict[str, Any]:
    try:
        command: dict[str, Any] = pipe.recv()
    except EOFError:
        os._exit(1)
    return command


def _quiet(_: str) -> None:
    pass
