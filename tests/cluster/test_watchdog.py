"""A process that stands still is ended, one that works is not, and who watches goes with it."""

import asyncio
import os
import signal
import sys

from baton.cluster.watchdog import Patience

PATIENCE_S = 120.0
WATCHED = """
import sys, threading
from baton.cluster.actor_process import LoopThread
from baton.core import log
log.configure()
loop = LoopThread("loop")
loop.end_process_if_it_stands_still()
for line in sys.stdin:
    print(loop._watched.pid, flush=True)
"""


def test_who_wants_no_cpu_and_says_nothing_is_given_four_seconds() -> None:
    patience = Patience()
    for _ in range(3):
        patience.heard()
        assert not any(patience.ends(busy=False) for _ in range(7))
    assert patience.ends(busy=False)


def test_who_wants_a_cpu_is_given_a_minute() -> None:
    patience = Patience()
    assert not any(patience.ends(busy=slice_ % 7 == 0) for slice_ in range(119))
    assert patience.ends(busy=True)


class Process:
    """One that is watched."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def watchdog(self) -> int:
        """Return the watchdog's pid."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"?\n")
        return int(await self.process.stdout.readline())


async def start() -> Process:
    pipe = asyncio.subprocess.PIPE
    return Process(
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", WATCHED, stdin=pipe, stdout=pipe, stderr=pipe
        )
    )


async def test_a_stopped_process_is_ended() -> None:
    watched = await start()
    async with asyncio.timeout(PATIENCE_S):
        await watched.watchdog()
        watched.process.send_signal(signal.SIGSTOP)
        _, said = await watched.process.communicate()
    assert watched.process.returncode == -signal.SIGKILL
    assert said.decode() == (
        f"watchdog: ended process {watched.process.pid}: its event loop stood still\n"
    )


async def test_a_watchdog_that_is_ended_has_a_successor_and_goes_with_its_process() -> None:
    watched = await start()
    async with asyncio.timeout(PATIENCE_S):
        first = await watched.watchdog()
        os.kill(first, signal.SIGKILL)
        while await watched.watchdog() == first:
            pass
        watched.process.kill()
        _, said = await watched.process.communicate()  # to its end: the second one has it as well
    assert b"ended process" not in said
