"""The processes of a session: found by the kernel's books, waited for by pidfd, never by name."""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    """Set a property of this process; see prctl(2)."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def session_members(session: int) -> dict[int, int]:
    """Return {pid: start time} of the live processes of a session.

    A child started with `start_new_session=True` leads a session of the same number as its pid.
    All that it starts stays in there, orphans too, and the kernel gives the number to nobody else
    while one of them lives. (pid, start time) names a process for good.
    """
    found: dict[int, int] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            seen = _state(int(entry.name))
            if seen is not None and seen[1] == session and seen[0] not in "ZX":
                found[int(entry.name)] = seen[2]
    return found


def send_signal(members: dict[int, int], number: signal.Signals) -> None:
    """Send a signal to each of `members` that is still the process it was."""
    for pid, start_time in members.items():
        seen = _state(pid)
        if seen is not None and seen[2] == start_time:
            _kill(pid, number)


async def wait_gone(pids: Iterable[int], timeout_s: float) -> None:
    """Return once all of them have exited, or after `timeout_s`."""
    watched = [fd for pid in pids if (fd := _pidfd(pid)) is not None]
    try:
        async with asyncio.timeout(timeout_s):
            for fd in watched:
                await _readable(fd)
    except TimeoutError:
        pass
    finally:
        for fd in watched:
            os.close(fd)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _state(pid: int) -> tuple[str, int, int] | None:
    """Return (state, session, start time) of a process; see proc_pid_stat(5)."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in brackets, which may itself hold brackets and blanks.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[3]), int(fields[19])
