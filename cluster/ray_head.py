"""Ray's head node, as a child process of ours that leaves nothing behind."""

import asyncio
import signal
import sys
from collections import deque
from pathlib import Path
from typing import Self

from baton.cluster.head_process import READY
from baton.cluster.processes import send_signal, session_members, wait_gone
from baton.core.errors import Unavailable

OBJECT_STORE_BYTES = 80_000_000
"""About the least that Ray accepts; only small control messages pass through it."""
_KEPT_LINES = 40
_KILL_TIMEOUT_S = 5.0


class RayHead:
    """One running head; made by `start`, ended by `stop`."""

    def __init__(self, process: asyncio.subprocess.Process, temp_dir: Path) -> None:
        self._process = process
        self._temp_dir = temp_dir
        self._output: deque[str] = deque(maxlen=_KEPT_LINES)
        self._ready = asyncio.Event()
        self._reader = asyncio.create_task(self._read_output())

    def __repr__(self) -> str:
        return f"RayHead(pid={self.pid}, exit={self._process.returncode})"

    @classmethod
    async def start(
        cls,
        temp_dir: Path,
        *,
        slots: int,
        environment: dict[str, str],
        timeout_s: float,
        port: int = 0,
    ) -> Self:
        """Start a head with room for `slots` instances on 127.0.0.1; all its files in `temp_dir`.

        `port` 0 takes a free one.

        Raises Unavailable, with the end of what Ray said, if it exits or takes too long.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-u",  # what it prints is how we know how far it is
            "-m",
            "baton.cluster.head_process",
            str(temp_dir),
            *arguments(temp_dir, slots, port),
            stdin=asyncio.subprocess.PIPE,  # its end tells the guard that we have ended
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            # A session of its own: Ctrl-C in the terminal reaches us alone; we end Ray in order.
            start_new_session=True,
        )
        head = cls(process, temp_dir)
        try:
            await head._wait_ready(timeout_s)
        except BaseException:
            await head.stop(grace_s=0.0)
            raise
        return head

    @property
    def pid(self) -> int:
        """The child's pid, which is also its session."""
        return self._process.pid

    @property
    def address(self) -> str:
        """host:port for ray.init."""
        return (self._temp_dir / "ray_current_cluster").read_text().strip()

    def members(self) -> dict[int, int]:
        """Return {pid: start time} of every live process that Ray started, the head included."""
        return session_members(self.pid)

    async def ended(self) -> None:
        """Wait until it ends; raises Unavailable then, with the errors that Ray told of."""
        await self._process.wait()
        errors = [line for line in self._output if " ERR " in line]
        raise Unavailable("\n".join(["Ray has ended", *errors]))

    async def stop(self, *, grace_s: float) -> None:
        """End the head and all that it started; `grace_s` is how long it may take by itself."""
        if grace_s > 0 and self._process.returncode is None:
            self._process.terminate()
            await wait_gone([self.pid], grace_s)
        assert self._process.stdin is not None
        self._process.stdin.close()  # now the guard kills what is left, and reaps it
        await wait_gone([self.pid], _KILL_TIMEOUT_S)
        left = self.members()
        send_signal(left, signal.SIGKILL)
        await wait_gone(left, _KILL_TIMEOUT_S)
        await self._process.wait()
        await self._reader

    async def _wait_ready(self, timeout_s: float) -> None:
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait(
                {ready, self._reader}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()
        if self._ready.is_set():
            return
        how = "exited" if self._reader.done() else f"was not ready after {timeout_s:g} s"
        raise Unavailable(f"Ray's head {how}; the end of its output:\n" + "\n".join(self._output))

    async def _read_output(self) -> None:
        """Take what Ray prints, so that its pipe never fills; ends when all holders have ended."""
        assert self._process.stdout is not None
        async for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self._output.append(line)
            if READY in line:
                self._ready.set()


def arguments(temp_dir: Path, slots: int, port: int = 0) -> tuple[str, ...]:
    """Return the arguments of `ray start`."""
    return (
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--temp-dir={temp_dir}",
        # One "CPU" is a place for one instance; Ray starts that many worker processes in advance.
        f"--num-cpus={slots}",
        "--num-gpus=0",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--no-monitor",
        "--disable-usage-stats",
        "--dashboard-agent-listen-port=0",
        "--log-style=record",
        "--log-color=false",
    )
