"""Speed of the transport between two processes, beside memcpy measured in the same round.

    python bench/micro_transport.py --rounds 9

Reads scattered KV blocks and one large run from another process over UCX, over what UCX chooses
and over TCP; also the share of the digest. Prints medians in GB/s with their range.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from baton.core.hashing import hash_bytes
from baton.core.ids import new_incarnation
from baton.kv_transfer.transport import Peer, Region, Run
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.transport import UcxTransport

Bytes = npt.NDArray[np.uint8]
Figures = dict[tuple[str, str], list[float]]
SIZE = 256 << 20
SHAPES = {
    "256 x 128 KiB scattered": (128 << 10, 256),
    "256 x 24 KiB scattered": (24 << 10, 256),
    "1 x 64 MiB": (64 << 20, 1),
    "1 x 8 B (µs)": (8, 1),
}
OPTIONS = {"UCX's choice": {}, "TCP": {"TLS": "tcp,self"}}


def runs_of(length: int, count: int) -> list[Run]:
    """Return `count` runs of `length` bytes, far apart on both sides, in shuffled order."""
    stride = max(length * 3 // 2, 64)
    order = np.random.default_rng(1).permutation(count)
    return [Run(int(i) * stride, int(j) * stride, length) for i, j in enumerate(order)]


async def serve(options: str) -> None:
    """Be the other process: own memory, say how to read it, live until stdin closes."""
    memory, transport = await opened("bench-target", dict(pairs_of(options)))
    sys.stdout.write(transport.metadata().hex() + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await transport.close()
    del memory


def pairs_of(text: str) -> list[tuple[str, str]]:
    """Return the NAME=VALUE pairs of a text separated by semicolons."""
    return [(name, value) for name, _, value in (p.partition("=") for p in text.split(";")) if name]


async def opened(owner: str, options: dict[str, str]) -> tuple[Bytes, UcxTransport]:
    """Return a region of SIZE bytes whose pages are there, and the transport that registered it."""
    memory = np.full(SIZE, 7, dtype=np.uint8)
    region = Region(memory.ctypes.data, memory.nbytes, memory)
    config = UcxConfig(options=options)
    transport = await UcxTransport.open(
        region, owner=owner, incarnation=new_incarnation(), config=config
    )
    return memory, transport


async def timed(work: Callable[[], Awaitable[object]], bytes_: int, repeat: int) -> float:
    """Return GB/s, or microseconds per call for tiny reads."""
    began = time.perf_counter()
    for _ in range(repeat):
        await work()
    seconds = (time.perf_counter() - began) / repeat
    return seconds * 1e6 if bytes_ < 1024 else bytes_ / seconds / 1e9


@asynccontextmanager
async def other_process(transport: UcxTransport, options: dict[str, str]) -> AsyncIterator[Peer]:
    """Start the other process, connected; end it."""
    text = ";".join(f"{k}={v}" for k, v in options.items())
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--serve",
        text,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    peer = await transport.add_peer(bytes.fromhex((await child.stdout.readline()).decode()))
    try:
        yield peer
    finally:
        await transport.remove_peer(peer)
        await child.communicate(b"")


class Round:
    """The three things that are done with the same runs, one after the other."""

    def __init__(self, transport: UcxTransport, peer: Peer, memory: Bytes, runs: list[Run]) -> None:
        self._transport = transport
        self._peer = peer
        self._memory = memory
        self._runs = runs

    async def read(self) -> str:
        """Read over UCX; return what carried it."""
        return (await self._transport.read(self._peer, self._runs).wait()).transport

    async def copy(self) -> None:
        """Copy within this process; from the far half, so that source and target differ."""
        for r in self._runs:
            source = (r.remote_offset + SIZE // 2) % (SIZE - r.length)
            target = self._memory[r.local_offset : r.local_offset + r.length]
            target[:] = self._memory[source : source + r.length]

    async def digest(self) -> None:
        """Hash what lies in the target."""
        for r in self._runs:
            hash_bytes(self._memory[r.local_offset : r.local_offset + r.length].data)


async def measure(rounds: int) -> Figures:
    """Return the figures of every round by (shape, way)."""
    figures: Figures = {}
    for name, options in OPTIONS.items():
        memory, transport = await opened("bench-reader", options)
        async with other_process(transport, options) as peer:
            for _ in range(rounds):
                for shape, (length, count) in SHAPES.items():
                    work = Round(transport, peer, memory, runs_of(length, count))
                    way = f"{name}: {await work.read()}"
                    total = length * count
                    repeat = 200 if total < 1024 else 3
                    for label, step in (
                        (way, work.read),
                        ("memcpy", work.copy),
                        ("xxh3_128", work.digest),
                    ):
                        value = await timed(step, total, repeat)
                        figures.setdefault((shape, label), []).append(value)
        await transport.close()
    return figures


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        asyncio.run(serve(arguments.serve))
        return
    figures = asyncio.run(measure(arguments.rounds))
    table = Table("shape", "way", "median GB/s", "min", "max", title=f"{os.cpu_count()} CPUs")
    for (shape, way), values in figures.items():
        table.add_row(
            shape,
            way,
            f"{statistics.median(values):.2f}",
            f"{min(values):.2f}",
            f"{max(values):.2f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
