"""A worker process as the driver holds it: start, ask, stop for a while, kill."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from baton.core.config import WorkerConfig
from baton.core.topology import InstanceInfo, Role
from baton.proto import worker_pb2 as pb
from baton.proto.grpc_runtime import open_channel
from baton.proto.worker_pb2_grpc import DecodeStub, PrefillStub

from . import worker_main
from .schedule import DECODES, PREFILLS, Fault

PATIENCE_S = 60.0
"""For whatever must happen in a process that is alive."""

_LOG_TAIL = 4000
"""Characters of a process's log that are shown with what is wrong with it."""

_FORKS = multiprocessing.get_context("forkserver")
# A fork of a process that has torch in memory is ready in a tenth of a second.
_FORKS.set_forkserver_preload(["baton.decode_worker.worker", "baton.prefill_worker.worker"])

Told = Callable[[dict[str, Any]], None]


class WorkerProcess:
    """One incarnation of a worker; made by `start`, ended by `kill` or `close`."""

    def __init__(self, process: Any, pipe: Connection, told: Told, log_path: Path) -> None:
        self._log_path = log_path
        self._facts: dict[str, Any] = {}
        self._process = process
        self._pipe = pipe
        self._told = told
        self._replies: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._reading = True
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._readable)

    @classmethod
    async def start(cls, config: WorkerConfig, told: Told, log_path: Path) -> "WorkerProcess":
        """Start it and wait until it serves; `told` hears of its events and strikes."""
        ours, theirs = _FORKS.Pipe()
        process = _FORKS.Process(
            target=worker_main.main, args=(config.model_dump_json(), theirs, log_path)
        )
        await asyncio.to_thread(process.start)
        theirs.close()
        worker = cls(process, ours, told, log_path)
        try:
            worker._facts = await worker._reply()
        except BaseException:
            await worker.kill()
            raise
        return worker

    def __repr__(self) -> str:
        return f"<WorkerProcess {self._facts.get('instance_id')}, pid {self._process.pid}>"

    @property
    def info(self) -> InstanceInfo:
        """What it says of itself."""
        return InstanceInfo(**self._facts)

    async def drain(self, deadline_s: float) -> int:
        """Drain it as a control plane does; return how much it handed over."""
        stub = PrefillStub if self.info.role is Role.PREFILL else DecodeStub
        async with open_channel(self.info.address) as channel, asyncio.timeout(PATIENCE_S):
            reply = await stub(channel).Drain(pb.DrainRequest(deadline_s=deadline_s))
        handed_over: int = reply.handed_over
        return handed_over

    def arm(self, faults: Sequence[Fault]) -> None:
        """Let these faults wait inside the process."""
        self._send({"do": "arm", "faults": [asdict(fault) for fault in faults]})

    async def held(self) -> dict[str, Any]:
        """Return what the process holds that an idle one would not; empty if nothing."""
        reply = await self._asked()
        stats = reply["stats"]
        held = {name: stats[name] for name in _GIVEN_BACK if stats.get(name)}
        if stats["peers"] >= PREFILLS + DECODES:  # one for each other name: the last one with it
            held["peers"] = stats["peers"]
        return held | ({"problem": reply["problem"]} if reply["problem"] else {})

    async def stats(self) -> dict[str, Any]:
        """Return its counters."""
        found: dict[str, Any] = (await self._asked())["stats"]
        return found

    async def _asked(self) -> dict[str, Any]:
        self._send({"do": "stats"})
        return await self._reply()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it lives."""
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    async def close(self) -> None:
        """Close it in good order: it checks its books, and fails if something is held."""
        self._send({"do": "close"})
        await self._reply()
        await asyncio.to_thread(self._process.join, PATIENCE_S)
        code = self._process.exitcode
        await self.kill()
        assert code == 0, f"{self!r} closed with exit code {code}\n{self.log_tail()}"

    def log_tail(self) -> str:
        """Return the end of its log."""
        return self._log_path.read_text(errors="replace")[-_LOG_TAIL:]

    async def kill(self) -> None:
        """End it as the kernel would. Safe to repeat."""
        self._stop_reading()
        self._process.kill()
        await asyncio.to_thread(self._process.join, PATIENCE_S)
        self._pipe.close()

    def _send(self, command: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # if it has died, the next reply says so
            self._pipe.send(command)

    async def _reply(self) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            reply = await self._replies.get()
        if "lost" in reply:
            self._replies.put_nowait(reply)
            await asyncio.to_thread(self._process.join, PATIENCE_S)
            code = self._process.exitcode
            raise AssertionError(f"{self!r} has died: exit code {code}\n{self.log_tail()}")
        return reply

    def _readable(self) -> None:
        try:
            while self._pipe.poll():
                message = self._pipe.recv()
                if "event" in message or "struck" in message:
                    self._told(message)
                else:
                    self._replies.put_nowait(message)
        except (EOFError, ConnectionResetError):
            self._stop_reading()
            self._replies.put_nowait({"lost": True})

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())


_GIVEN_BACK = (
    "blocks_used",
    "blocks_fencing",
    "waiting",
    "running",
    "transfers_open",
    "open_requests",
    "attempts",
    "tasks",
    "tasks_crashed",
    "tickets_open",
    "sessions",
)
"""Counters of stats() that are zero when nothing is open."""
