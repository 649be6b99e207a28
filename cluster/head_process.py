"""The child process that runs Ray's head: `python -m baton.cluster.head_process TEMP_DIR ARG…`.

With --outlive before TEMP_DIR it returns once Ray is up, and leaves a guard behind that lives until
it gets SIGTERM; the last line that it prints is the guard's pid. Without:

It is a guard with `ray start --head` as its child. It lives for as long as Ray does, and ends Ray
when our process ends, however that comes: standard input is a pipe that only we hold open.
Ray's own processes are no substitute: they notice a dead parent only if pid 1 adopts them, which is
not so under `systemd --user` or in many containers.
"""

import os
import selectors
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baton.cluster.processes import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    prctl,
    send_signal,
    session_members,
)

READY = "block forever"
"""Ray says so last of all, when its address is written down too."""


def without_client_server(parameters: Any, head: bool) -> None:
    """Change what `ray start` starts; Ray calls this through RAY_START_HOOK.

    There is no option that leaves out the server for remote Ray clients.
    """
    parameters.ray_client_server_port = None


def main() -> None:
    if sys.argv[1] == "--outlive":
        _outlive(*sys.argv[2:])
        return
    temp_dir, *arguments = sys.argv[1:]
    child = _fork_ray(arguments, output=None)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    abandoned = _wait(child)
    _end_session()
    if abandoned:
        shutil.rmtree(Path(temp_dir), ignore_errors=True)


def _outlive(temp_dir: str, *arguments: str) -> None:
    """Print what Ray says until it is up, then the guard's pid; exit 1 if it does not come up."""
    told, tell = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(told)
        os.setsid()
        _guard_alone(Path(temp_dir), list(arguments), tell)
    os.close(tell)
    with os.fdopen(told, errors="replace") as lines:
        for line in lines:
            print(line, end="", flush=True)  # noqa: T201
            if READY in line:
                print(guard, flush=True)  # noqa: T201
                return
    raise SystemExit(1)


def _guard_alone(temp_dir: Path, arguments: list[str], tell: int) -> None:
    """Run Ray until it ends or SIGTERM comes; who started us hears its output until it is up."""
    heard, output = os.pipe()
    child = _fork_ray(arguments, output)
    os.close(output)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    said, wanted = b"", True
    with (temp_dir / "head.log").open("ab", buffering=0) as log:
        for text in _output_of(child, heard):
            log.write(text)
            if wanted:
                wanted = _told(tell, text)
                said += text
                if not wanted and READY.encode() not in said:
                    break  # nobody knows of it: who started us was stopped
    _end_session()
    shutil.rmtree(temp_dir, ignore_errors=True)
    os._exit(0)


def _told(tell: int, text: bytes) -> bool:
    """Write to a pipe; return whether anybody reads it."""
    try:
        os.write(tell, text)
    except BrokenPipeError:
        return False
    return True


def _output_of(child: int, heard: int) -> Iterator[bytes]:
    """Yield what comes through a pipe until the child has ended, whoever else may hold the pipe."""
    with selectors.DefaultSelector() as selector:
        selector.register(heard, selectors.EVENT_READ)
        selector.register(os.pidfd_open(child), selectors.EVENT_READ)
        while True:
            ready = [key.fd for key, _ in selector.select()]
            if heard not in ready:
                return
            if text := os.read(heard, 1 << 16):
                yield text
            else:
                selector.unregister(heard)


def _fork_ray(arguments: list[str], output: int | None) -> int:
    """Start Ray as our child, its output to a pipe if one is given; return its pid."""
    # Orphans come to this process and not to pid 1, so that it can see to their end.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
        _run_ray(guard, arguments)
    return child


def _run_ray(guard: int, arguments: list[str]) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # it ended before the line above
        raise SystemExit(1)
    from ray.scripts.scripts import main as ray

    sys.argv = ["ray", "start", *arguments]
    ray()  # type: ignore[no-untyped-call]
    raise SystemExit(0)


def _wait(child: int) -> bool:
    """Wait until the child has ended or standard input has; return whether it was the latter."""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(os.pidfd_open(child), selectors.EVENT_READ)
        return any(key.fd == 0 for key, _ in selector.select())


def _end_session() -> None:
    """Kill all other processes of this session, and reap them."""
    while others := {p: t for p, t in session_members(os.getsid(0)).items() if p != os.getpid()}:
        send_signal(others, signal.SIGKILL)
        _reap_all()
    _reap_all()


def _reap_all() -> None:
    """Wait for every child; those of a child that ends become ours, and are waited for as well."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


if __name__ == "__main__":
    main()
