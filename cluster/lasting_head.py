"""A Ray head that outlives the command that starts it, and the note by which others find it."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from baton.cluster import ray_environment
from baton.cluster.processes import send_signal, session_members, wait_gone
from baton.cluster.ray_head import arguments
from baton.core.errors import InvalidConfig, Unavailable

_STOP_GRACE_S = 20.0
_KILL_TIMEOUT_S = 5.0
_SHOWN_LINES = 40


@dataclass(frozen=True, slots=True)
class Note:
    """How to attach to a Ray cluster; a file that only its owner may read."""

    address: str
    """host:port of Ray's head."""
    token: str | None = None
    """The password, if we started it; else the user's environment has it."""
    guard: int | None = None
    """Pid and session of the process that keeps it, if we started it."""
    temp_dir: str | None = None
    """Its files, if we started it."""

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the note at `path`; None if there is none."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            allowed = f"what `baton up` wrote; remove it if nothing runs ({error})"
            raise InvalidConfig(str(path), "its content", allowed) from None

    def write(self, path: Path) -> None:
        """Write it where `read` finds it; nobody else may read it, not even for a moment."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file)
        draft.replace(path)

    def alive(self) -> bool:
        """Return whether the head that we started runs; True if it is not ours."""
        return self.guard is None or bool(session_members(self.guard))


async def start(temp_dir: Path, *, slots: int, threads: int, timeout_s: float) -> Note:
    """Start a head that gives out `slots` CPUs on 127.0.0.1; all its files lie in `temp_dir`.

    Raises Unavailable, with the end of what Ray said, if it exits or takes too long.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "baton.cluster.head_process",
        "--outlive",
        str(temp_dir),
        *arguments(temp_dir, slots),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**ray_environment.head_environment(threads), "PYTHONUNBUFFERED": "1"},
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"Ray's head was not ready after {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()  # the guard then ends Ray
    lines = output.decode(errors="replace").splitlines()
    if process.returncode != 0:
        raise Unavailable("Ray's head exited; it said:\n" + "\n".join(lines[-_SHOWN_LINES:]))
    return Note(
        address=(temp_dir / "ray_current_cluster").read_text().strip(),
        token=ray_environment.ENVIRONMENT["RAY_AUTH_TOKEN"],
        guard=int(lines[-1]),
        temp_dir=str(temp_dir),
    )


async def stop(note: Note) -> None:
    """End a head that we started, and all that it started; does nothing for another."""
    if note.guard is None:
        return
    members = session_members(note.guard)
    guard = {pid: since for pid, since in members.items() if pid == note.guard}
    send_signal(guard, signal.SIGTERM)
    await wait_gone(guard, _STOP_GRACE_S)
    left = session_members(note.guard)
    send_signal(left, signal.SIGKILL)
    await wait_gone(left, _KILL_TIMEOUT_S)
