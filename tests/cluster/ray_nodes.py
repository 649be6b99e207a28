"""Ray over several nodes: the head on the first, and a worker on each of the others."""

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from .nodes import Node, Nodes

_PORT = 6379
_START_S = 240.0
_STARTS = 3
_OBJECT_STORE_BYTES = 80_000_000
_FAST_HEALTH = {
    # A node that is gone is noticed after about four seconds; by default it takes fifteen.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class RayNodes:
    """`async with RayNodes(3, folder) as ray:` — afterwards nothing is left of it."""

    def __init__(self, count: int, folder: Path, *, cpus: int) -> None:
        """`cpus`: how many each node gives out; the logs of `ray start` lie in `folder`."""
        self.nodes = Nodes(count, folder)
        self.address = f"10.77.0.1:{_PORT}"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Importing baton's Ray calls has said "0" here, for a Ray on 127.0.0.1.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_START_HOOK": "baton.cluster.head_process.without_client_server",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            # Compiled kernels: else the first instance on each node would compile them anew.
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
            **_FAST_HEALTH,
        }
        """Of every process of this Ray and of its drivers."""
        self._cpus = cpus
        self._folder = folder
        self._rays: dict[int, subprocess.Popen[str]] = {}
        self._files = ExitStack()
        self._starts = 0

    async def __aenter__(self) -> Self:
        self.nodes.__enter__()
        try:
            await self.start_ray(1)
            await asyncio.gather(*(self.start_ray(k) for k in range(2, len(self.nodes) + 1)))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.nodes.__exit__(kind, error, trace)
        for ray in self._rays.values():
            await asyncio.to_thread(ray.wait, 20)
        self._files.close()

    def node(self, index: int) -> Node:
        """Return a node, from 1."""
        return self.nodes[index]

    def index_of(self, address: str) -> int:
        """Return the node with the host of an address."""
        return int(address.partition(":")[0].rpartition(".")[2])

    async def start_ray(self, index: int) -> None:
        """Start Ray on a node that has none; returns when it is up.

        It is tried again: `ray start` gives up when a call to the head takes 30 s, as happens on a
        machine with ten times more to do than it has cores, and cannot be told to wait longer.
        """
        for attempts_left in reversed(range(_STARTS)):
            log = self._spawn(index)
            async with asyncio.timeout(_START_S):
                while self.running(index):
                    if "block forever" in log.read_text():
                        return
                    await asyncio.sleep(0.1)
            assert attempts_left, log.read_text()

    def _spawn(self, index: int) -> Path:
        """Begin to start Ray on a node; return its log."""
        node = self.nodes[index]
        self._starts += 1
        log = self._folder / f"ray-{index}.{self._starts}.log"
        output = self._files.enter_context(log.open("w"))
        role = _head(self.nodes.own) if index == 1 else (f"--address={self.address}",)
        self._rays[index] = node.spawn(
            sys.executable,
            "-c",
            "from ray.scripts.scripts import main; main()",
            "start",
            *role,
            "--block",
            f"--node-ip-address={node.address}",
            f"--num-cpus={self._cpus}",
            "--num-gpus=0",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--dashboard-agent-listen-port=0",
            output=output,
            environment=self.environment,
        )
        return log

    async def power_cut(self, index: int) -> None:
        """Take a node's power."""
        await asyncio.to_thread(self.nodes[index].power_cut)

    async def power_on(self, index: int) -> None:
        """Give it its power again, and start Ray."""
        await asyncio.to_thread(self.nodes[index].power_on)
        await self.start_ray(index)

    def running(self, index: int) -> bool:
        """Return whether Ray runs on a node; it ends by itself once the head has given it up."""
        return self._rays[index].poll() is None

    async def signal(self, address: str, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process of a node, by the pid that it has there."""
        node = self.nodes[self.index_of(address)]
        with contextlib.suppress(subprocess.CalledProcessError):  # it has ended
            await asyncio.to_thread(node.run, "kill", f"-{int(number)}", str(pid))


def _head(own: Path) -> tuple[str, ...]:
    return (
        "--head",
        f"--port={_PORT}",
        f"--temp-dir={own}/r",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--disable-usage-stats",
    )
