"""Speed of every transport between two processes, beside a memcpy out of shared memory.

    python bench/transfer.py --rounds 7

In each round every way does the same reads one after the other, so that all see the same machine;
a figure is a median over the rounds in GB/s, with its share of the memcpy of the same round. Prints
Markdown.
"""

import argparse
import asyncio
import ctypes
import json
import os
import socket
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from transfer_peer import SIZE, GlooReader, RawReader, shared, transports

from baton.core.hashing import hash_bytes
from baton.kernels.kv_digest import Pieces, copy_and_hash, expand_key, hash_units
from baton.kv_transfer.transport import Peer, ReadUnits, Run, Transport

KIB, MIB = 1 << 10, 1 << 20
SHAPES = {
    "64 KiB": (64 * KIB, 1),
    "1 MiB": (MIB, 1),
    "16 MiB": (16 * MIB, 1),
    "256 MiB": (256 * MIB, 1),
    "512 of 32 KiB": (32 * KIB, 512),
}
BLOCK = 32 * KIB
HANDOVERS, BLOCKS_EACH = 64, 16
MEMCPY = "memcpy, shared memory"
HASHES = "shm, mapped"
"""The transport that digests on the way, if it is asked to."""
ON_THE_WAY = "the same, digested on the way"
UNIT = MIB
"""What has a digest of its own is at most so large."""
KEY = expand_key(b"bench")
AT_LEAST_S = 0.02
"""A figure is taken over repeated reads that take so long together."""

Read = Callable[[list[Run]], Awaitable[object]]
Figures = dict[tuple[str, str], list[float]]
"""By (way, column), one for each round."""


def runs_of(length: int, count: int, seed: int = 1) -> list[Run]:
    """Return `count` runs of `length` bytes at random places on both sides, none twice."""
    draw = np.random.default_rng(seed)
    local, remote = (draw.permutation(SIZE // length)[:count].tolist() for _ in range(2))
    return [Run(a * length, b * length, length) for a, b in zip(local, remote, strict=True)]


def units_of(runs: list[Run], *, local: bool) -> Pieces:
    """Return runs as units of UNIT bytes at most, as they lie on one side."""
    places = [(run.local_offset if local else run.remote_offset, run.length) for run in runs]
    cut = [(at + i, min(UNIT, n - i)) for at, n in places for i in range(0, n, UNIT)]
    offsets, lengths = np.ascontiguousarray(np.array(cut, np.int64).T)
    return Pieces(offsets, lengths, np.arange(1, len(cut) + 1))


def read_units(runs: list[Run]) -> ReadUnits:
    """Return what is to be hashed of `runs` on the way."""
    there, here = units_of(runs, local=False), units_of(runs, local=True)
    return ReadUnits(KEY, np.zeros((here.ends.size, 64), np.uint8), there, here.offsets)


class Ways:
    """Everything that can read from the other process."""

    def __init__(self, memory: np.ndarray, source: np.ndarray) -> None:
        self.memory = memory
        self._source = source
        self._to, self._from = memory.ctypes.data, source.ctypes.data
        self.pairs: dict[str, tuple[Transport, Peer]] = {}
        self.others: dict[str, RawReader | GlooReader] = {}

    def reads(self) -> dict[str, Read]:
        """Return every way to read by its name, the memcpy first."""
        found: dict[str, Read] = {MEMCPY: self._copy}
        for name, (transport, peer) in self.pairs.items():
            found[name] = lambda runs, t=transport, p=peer: t.read(p, runs).wait()
        return found | {name: other.read for name, other in self.others.items()}

    async def _copy(self, runs: list[Run]) -> None:
        for run in runs:
            ctypes.memmove(self._to + run.local_offset, self._from + run.remote_offset, run.length)

    def hashed_read(self, runs: list[Run]) -> Callable[[], Awaitable[object]]:
        """Return the read of `runs` by the transport that hashes on the way."""
        transport, peer = self.pairs[HASHES]
        units = read_units(runs)

        async def read() -> None:
            transfer = transport.read(peer, runs, lambda: units)
            await transfer.wait()
            assert transfer.hashes is not None, "not hashed on the way"

        return read

    def hashing(self, runs: list[Run]) -> dict[str, Callable[[], object]]:
        """Return what can be done to `runs` without the other process, by its name."""
        memory, source = self.memory, self._source
        here, there = units_of(runs, local=True), units_of(runs, local=False)
        labels = np.zeros((here.ends.size, 64), np.uint8)
        parts = [memory[at : at + n].data for at, n in zip(here.offsets, here.lengths, strict=True)]
        return {
            "digest": lambda: hash_units(KEY, memory, here, labels),
            ON_THE_WAY: lambda: copy_and_hash(KEY, memory, here.offsets, source, there, labels),
            "xxh3_128": lambda: [hash_bytes(part) for part in parts],
        }

    async def close(self) -> None:
        """End every way, so that the other process can end."""
        for other in self.others.values():
            other.close()
        for transport, peer in self.pairs.values():
            await transport.remove_peer(peer)
            await transport.close()


@asynccontextmanager
async def opened() -> AsyncIterator[Ways]:
    """Start the other process, and connect to it in every way."""
    shared_memory, memory = shared()
    _, source = shared()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("transfer_peer.py")),
        str(port),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    ways = Ways(memory, source)
    # The group is joined first: the other process waits for it in a thread.
    gloo = await asyncio.to_thread(GlooReader, memory, port)
    assert child.stdout is not None
    said = json.loads(await child.stdout.readline())
    for name, transport in (await transports("bench", shared_memory.region(memory))).items():
        peer = await transport.add_peer(bytes.fromhex(said["metadata"][name]))
        ways.pairs[name] = (transport, peer)
    view = memoryview(memory)
    unix, tcp = said["raw"]["unix"], said["raw"]["tcp"]
    ways.others["Unix socket, blocking"] = RawReader(socket.AF_UNIX, unix, view)
    ways.others["TCP socket, blocking"] = RawReader(socket.AF_INET, tcp, view)
    ways.others["gloo send/recv"] = gloo
    try:
        yield ways
    finally:
        await ways.close()
        await child.communicate(b"")


async def seconds(work: Callable[[], Awaitable[object]]) -> float:
    """Return the time of one call, from as many as fill AT_LEAST_S."""
    began, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < AT_LEAST_S:
        await work()
        calls += 1
    return spent / calls


async def seconds_each(read: Read, runs: list[Run], then: Callable[[], object]) -> float:
    """Return what `then` takes, in shares of the read that it follows each time."""
    reading = following = 0.0
    while reading < AT_LEAST_S:
        began = time.perf_counter()
        await read(runs)
        ended = time.perf_counter()
        then()
        reading += ended - began
        following += time.perf_counter() - ended
    return following / reading


async def speeds(ways: Ways, rounds: int) -> tuple[Figures, Figures, Figures]:
    """Return, in every shape, GB/s of every way; of digests; and their share of a read's time."""
    plain: Figures = defaultdict(list)
    hashed: Figures = defaultdict(list)
    shares: Figures = defaultdict(list)
    reads = ways.reads()
    for number in range(rounds):
        for shape, (length, count) in SHAPES.items():
            runs = runs_of(length, count, number)
            size = length * count
            hashing = ways.hashing(runs)
            for way, read in reads.items():
                await read(runs)  # touches the pages
                took = await seconds(lambda read=read, runs=runs: read(runs))
                plain[way, shape].append(size / took / 1e9)
                if way == HASHES:
                    took = await seconds(ways.hashed_read(runs))
                    plain[f"{way}, digested on the way", shape].append(size / took / 1e9)
                for name in ("digest", "xxh3_128"):
                    share = await seconds_each(read, runs, hashing[name])
                    shares[f"{way}, {name}", shape].append(share)
            hashed[MEMCPY, shape] = plain[MEMCPY, shape]
            for name, work in hashing.items():

                async def call(work: Callable[[], object] = work) -> None:
                    work()

                hashed[name, shape].append(size / await seconds(call) / 1e9)
    return plain, hashed, shares


async def latencies(ways: Ways, reads: int) -> dict[str, list[float]]:
    """Return the microseconds of each of many reads of one block."""
    found: dict[str, list[float]] = {}
    for way, read in ways.reads().items():
        times = found[way] = []
        for number in range(reads):
            runs = runs_of(BLOCK, 1, number)
            began = time.perf_counter()
            await read(runs)
            times.append((time.perf_counter() - began) * 1e6)
    return found


async def together(ways: Ways, rounds: int) -> Figures:
    """Return GB/s of the reads of many handovers posted at once; by transports only."""
    found: Figures = defaultdict(list)
    runs = runs_of(BLOCK, HANDOVERS * BLOCKS_EACH)
    parts = [runs[i::HANDOVERS] for i in range(HANDOVERS)]
    for _ in range(rounds):
        for way in (MEMCPY, *ways.pairs):
            read = ways.reads()[way]

            async def all_at_once(read: Read = read) -> None:
                await asyncio.gather(*(read(part) for part in parts))

            took = await seconds(all_at_once)
            found[way, ""].append(BLOCK * len(runs) / took / 1e9)
    return found


def cell(figures: Figures, way: str, column: str) -> str:
    """Return the median speed, and its share of the memcpy of the same round."""
    mine, memcpy = figures[way, column], figures[MEMCPY, column]
    share = statistics.median(a / b for a, b in zip(mine, memcpy, strict=True))
    return f"{statistics.median(mine):.1f} ({share:.2f})"


def shares_table(shares: Figures, ways: list[str]) -> str:
    """Return what a digest after the read costs, and in brackets what xxh3_128 would."""
    rows = []
    for way in ways:
        row = [way]
        for shape in SHAPES:
            ours, xxh3 = (
                statistics.median(shares[f"{way}, {name}", shape])
                for name in ("digest", "xxh3_128")
            )
            row.append(f"{ours:.0%} ({xxh3:.0%})")
        rows.append(row)
    return table(["Digest after the read, share of its time (xxh3_128)", *SHAPES], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


async def measure(rounds: int) -> str:
    """Return the report."""
    async with opened() as ways:
        plain, hashed, shares = await speeds(ways, rounds)
        latency = await latencies(ways, 200 * rounds)
        many = await together(ways, rounds)
        names = list(ways.reads())
    out = [f"{rounds} rounds, {os.cpu_count()} CPUs; GB/s (share of the memcpy beside it)."]
    for title, figures in (("Read", plain), ("Digest alone", hashed)):
        found = dict.fromkeys(way for way, _ in figures)
        rows = [[way, *(cell(figures, way, shape) for shape in SHAPES)] for way in found]
        out.append(table([title, *SHAPES], rows))
    out.append(shares_table(shares, names))
    rows = [
        [way, f"{statistics.median(times):.0f}", f"{np.percentile(times, 99):.0f}"]
        for way, times in latency.items()
    ]
    out.append(table(["One block of 32 KiB, µs", "median", "p99"], rows))
    rows = [[way, cell(many, way, "")] for way, _ in many]
    out.append(table([f"{HANDOVERS} handovers at once, {BLOCKS_EACH} blocks each", "GB/s"], rows))
    return "\n\n".join(out)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    print(asyncio.run(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
