"""The worlds in which the transport tests run: a reader here, and a target that can be killed."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

import baton
from baton.core.ids import new_incarnation
from baton.kv_transfer.loopback import LoopbackNetwork, LoopbackTransport
from baton.kv_transfer.transport import Region, Transport

from .transport_target import Bytes, memory_of, opened

SIZE = 8 << 20
"""Bytes of the region on either side."""
TARGET = Path(__file__).with_name("transport_target.py")
T = TypeVar("T")
SECRET = "the secret of the test cluster"


async def soon(awaitable: Awaitable[T]) -> T:
    """Wait, but not for ever."""
    async with asyncio.timeout(20):
        return await awaitable


def pattern(seed: int) -> Bytes:
    """Return the bytes of a target that was started with `seed`; none is 0."""
    return np.random.default_rng(seed).integers(1, 256, SIZE, dtype=np.uint8)


def region_of(memory: Bytes) -> Region:
    """Return `memory` as a region."""
    return Region(memory.ctypes.data, memory.nbytes, memory)


class World(Protocol):
    """A reader with empty memory, and targets named `prefill`, one at a time."""

    reader: Transport
    memory: Bytes
    carrier: str
    """What the report must name as transport."""

    async def start_target(self, seed: int) -> bytes:
        """Start a target whose memory is `pattern(seed)`; return its metadata."""

    def kill_target(self) -> None:
        """End the target as SIGKILL does."""

    async def close(self) -> None:
        """End all that is left, and check it."""


class LoopbackWorld:
    """Both sides in this process."""

    carrier = "loopback"

    def __init__(self) -> None:
        self.network = LoopbackNetwork()
        self.memory: Bytes = np.zeros(SIZE, np.uint8)
        self.reader = LoopbackTransport(
            region_of(self.memory),
            owner="decode",
            incarnation=new_incarnation(),
            network=self.network,
        )

    async def start_target(self, seed: int) -> bytes:
        target = LoopbackTransport(
            region_of(pattern(seed)),
            owner="prefill",
            incarnation=new_incarnation(),
            network=self.network,
        )
        return target.metadata()

    def kill_target(self) -> None:
        self.network.kill("prefill")

    async def close(self) -> None:
        await soon(self.reader.close())
        self.reader.check()


class ProcessWorld:
    """The target is a process of its own."""

    def __init__(self, kind: str, carrier: str, options: dict[str, str]) -> None:
        self.kind = kind
        self.carrier = carrier
        self.options = options
        self.owner_may_die = kind == "ucx" and carrier == "tcp"
        """UCX over TCP ends the owner of the memory if it is cut off while it sends, as when it has
        hung; that is UCX's own (docs/decisions/0010), and `auto` does not use it."""
        self.processes: list[subprocess.Popen[str]] = []

    async def open(self) -> "ProcessWorld":
        """Start the reader."""
        self.memory, self.region = memory_of(self.kind, SIZE)
        self.reader = await soon(
            opened(self.kind, self.region, owner="decode", secret=SECRET, options=self.options)
        )
        return self

    async def start_target(self, seed: int, *, secret: str = "") -> bytes:
        return await soon(asyncio.to_thread(self._spawn, seed, secret or SECRET))

    def _spawn(self, seed: int, secret: str) -> bytes:
        wish = {
            "kind": self.kind,
            "owner": "prefill",
            "size": SIZE,
            "seed": seed,
            "options": self.options,
            "secret": secret,
        }
        source = str(Path(baton.__file__).parents[1])
        process = subprocess.Popen(
            [sys.executable, str(TARGET), json.dumps(wish)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": source},
        )
        self.processes.append(process)
        assert process.stdout is not None
        return bytes.fromhex(process.stdout.readline())

    @property
    def target(self) -> "subprocess.Popen[str]":
        """The target that was started last."""
        return self.processes[-1]

    def kill_target(self) -> None:
        self.target.kill()
        self.target.wait(10)

    async def end_target(self) -> None:
        """Let the target close in good order."""
        process = self.target
        await soon(asyncio.to_thread(process.communicate))  # closes stdin, for which it waits
        assert process.returncode == 0, "the target did not end well"
        self.processes.remove(process)

    async def close(self) -> None:
        await soon(self.reader.close())
        self.reader.check()
        for process in self.processes:
            ended = process.poll() is not None
            process.communicate(timeout=10)
            well = process.returncode == 0 or self.owner_may_die
            assert ended or well, "the target did not end well"


WORLDS = {
    "ucx-cma": ("ucx", "cma", {"TLS": "cma,tcp"}),
    "ucx-tcp": ("ucx", "tcp", {"TLS": "tcp"}),
    "shm": ("shm", "shm", {}),
    "shm-cma": ("cma", "shm-cma", {}),
    "tcp": ("tcp", "tcp", {}),
    "auto": ("auto", "shm", {}),
    "cuda_ipc": ("cuda_ipc", "cuda_ipc", {}),
}
"""By name: the transport, what must carry the bytes, and options of UCX."""


async def open_world(name: str) -> World:
    """Open `loopback` or one of WORLDS."""
    if name == "loopback":
        return LoopbackWorld()
    return await ProcessWorld(*WORLDS[name]).open()
