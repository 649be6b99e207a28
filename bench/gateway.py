"""What the front door costs: a gateway whose decode instance answers at once, beside bare servers.

    python bench/gateway.py                      all cases, about five minutes
    python bench/gateway.py --memory 100000      and how its memory grows over so many requests
    python bench/gateway.py --memory 100000 --rounds 0       that alone

Every case is run against the gateway and, beside it, against a bare server of the same library
that sends as many events: what is lost to that is Baton's. Load, gateway and instance share this
machine, so the CPU time of the gateway's process says more than the rate.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as pb_grpc

SERVERS = Path(__file__).with_name("gateway_servers.py")
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
Ask = Callable[[int], Awaitable[float]]
"""Sends one request for so many tokens, reads it to its end; seconds to the first."""


@dataclass(frozen=True, slots=True)
class Case:
    """How many requests at a time, and of what size."""

    name: str
    streams: int
    tokens: int
    requests: int


CASES = (
    Case("1 at a time, 16 tokens", 1, 16, 300),
    Case("64 at a time, 16 tokens", 64, 16, 1500),
    Case("1,000 at a time, 16 tokens", 1000, 16, 3000),
    Case("64 at a time, 256 tokens", 64, 256, 384),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one case against one server."""

    requests_per_s: float
    tokens_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    """The server's own CPU time per request."""


class Server:
    """One process of gateway_servers.py."""

    def __init__(self, kind: str, *arguments: str) -> None:
        # Its log goes to a file, as it does in earnest: a pipe that nobody reads would stop it.
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, str(SERVERS), kind, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert self.process.stdout is not None
        self.addresses = self.process.stdout.readline().split()
        if not self.addresses:
            log.seek(0)
            raise RuntimeError(f"{kind} did not start: {log.read()}")

    def cpu_s(self) -> float:
        """CPU time so far."""
        fields = self._read("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mib(self) -> float:
        """Memory that is resident now."""
        return int(self._read("statm").split()[1]) * PAGE / (1 << 20)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()

    def _read(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()


class HttpClient:
    """Completions over connections that are kept; as little of HTTP as can be, to cost little."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __call__(self, tokens: int) -> float:
        """See Ask."""
        reader, writer = await self._connection()
        body = json.dumps(
            {"model": "bench", "prompt": [5] * 32, "max_tokens": tokens, "stream": True}
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: bench\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        started = time.perf_counter()
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode())
        data = await reader.readuntil(b"data: ")
        first = time.perf_counter() - started
        while not data.endswith(b"0\r\n\r\n"):
            data = await reader.readuntil(b"\r\n\r\n")
        self._idle.append((reader, writer))
        return first

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return one that was kept, and that the server has not closed since, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await self._connect()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port, limit=1 << 20)

    async def close(self) -> None:
        """Close all connections."""
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


class GrpcClient:
    """Generate calls on one channel."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = pb_grpc.InferenceStub(self._channel)

    async def __call__(self, tokens: int) -> float:
        """See Ask."""
        prompt = pb.TokenIds(ids=[5] * 32)
        started = time.perf_counter()
        first = 0.0
        async for _ in self._stub.Generate(
            pb.GenerateRequest(model="bench", token_ids=prompt, max_tokens=tokens)
        ):
            first = first or time.perf_counter() - started
        return first

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


async def played(ask: Ask, streams: int, tokens: int, requests: int) -> list[float]:
    """Send `requests`, `streams` at a time; return the seconds of each to its first token."""
    left = iter(range(requests))
    taken: list[float] = []

    async def one_after_the_other() -> None:
        for _ in left:
            seconds = await ask(tokens)
            taken.append(seconds)

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(one_after_the_other())
    return taken


async def measured(ask: Ask, case: Case, server: Server) -> Figures:
    """Run a case."""
    await played(ask, case.streams, 1, case.streams)  # connections, caches
    cpu, started = server.cpu_s(), time.perf_counter()
    taken = sorted(await played(ask, case.streams, case.tokens, case.requests))
    seconds = time.perf_counter() - started
    return Figures(
        requests_per_s=case.requests / seconds,
        tokens_per_s=case.requests * case.tokens / seconds,
        p50_ms=1e3 * statistics.median(taken),
        p99_ms=1e3 * taken[int(0.99 * (len(taken) - 1))],
        cpu_us=1e6 * (server.cpu_s() - cpu) / case.requests,
    )


@contextlib.contextmanager
def servers() -> Iterator[dict[str, Server]]:
    """Start all of them."""
    found: dict[str, Server] = {}
    try:
        found["instance"] = Server("instance")
        found["gateway"] = Server("gateway", *found["instance"].addresses)
        found["sse"] = Server("sse")
        found["grpc"] = Server("grpc")
        yield found
    finally:
        for server in reversed(found.values()):
            server.close()


@contextlib.asynccontextmanager
async def client(kind: type[HttpClient] | type[GrpcClient], address: str) -> AsyncIterator[Ask]:
    """Return what asks the server at an address."""
    made = kind(address)
    try:
        yield made
    finally:
        await made.close()


async def compare(found: dict[str, Server], rounds: int) -> None:
    """Print a table for each API, Baton's beside the bare one's; medians of the rounds."""
    http, rpc = found["gateway"].addresses
    pairs = {
        "HTTP": (HttpClient, http, found["sse"]),
        "gRPC": (GrpcClient, rpc, found["grpc"]),
    }
    for api, (kind, address, bare) in pairs.items():
        print(f"\n| {api} | requests/s | tokens/s | first token p50, p99, ms | CPU, µs a request |")
        print("| --- | --- | --- | --- | --- |")
        for case in CASES:
            ours, limit = [], []
            for _ in range(rounds):
                async with client(kind, address) as ask:
                    ours.append(await measured(ask, case, found["gateway"]))
                async with client(kind, bare.addresses[0]) as ask:
                    limit.append(await measured(ask, case, bare))
            print(_row(case.name, ours), flush=True)
            print(_row("… bare", limit), flush=True)
            print(_added(ours, limit), flush=True)


def _added(ours: list[Figures], limit: list[Figures]) -> str:
    """What the gateway adds to the bare server's."""

    def added(of: Callable[[Figures], float]) -> float:
        return statistics.median(map(of, ours)) - statistics.median(map(of, limit))

    return (
        f"| … added | | | {added(lambda f: f.p50_ms):.1f}, {added(lambda f: f.p99_ms):.1f} "
        f"| {added(lambda f: f.cpu_us):,.0f} |"
    )


def _row(name: str, figures: list[Figures]) -> str:
    def median(of: Callable[[Figures], float]) -> float:
        return statistics.median(of(f) for f in figures)

    return (
        f"| {name} | {median(lambda f: f.requests_per_s):,.0f} "
        f"| {median(lambda f: f.tokens_per_s):,.0f} "
        f"| {median(lambda f: f.p50_ms):.1f}, {median(lambda f: f.p99_ms):.1f} "
        f"| {median(lambda f: f.cpu_us):,.0f} |"
    )


async def memory(found: dict[str, Server], requests: int) -> None:
    """Print the gateway's resident memory over so many requests of four tokens, by HTTP."""
    gateway = found["gateway"]
    part = requests // 10
    print(f"\n| requests of {requests:,} | resident, MiB |\n| --- | --- |")
    async with client(HttpClient, gateway.addresses[0]) as ask:
        for done in range(part, requests + 1, part):
            await played(ask, 64, 4, part)
            print(f"| {done:,} | {gateway.rss_mib():.1f} |", flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=0, metavar="REQUESTS")
    options = parser.parse_args()
    with servers() as found:
        if options.rounds:
            await compare(found, options.rounds)
        if options.memory:
            await memory(found, options.memory)


if __name__ == "__main__":
    asyncio.run(main())
