"""The child process that runs Ray's head: `python -m baton.cluster.head_process TEMP_DIR ARG…`.

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
from pathlib import Path
from typing import Any

from baton.cluster.processes import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    prctl,
    send_signal,
    session_members,
)


def without_client_server(parameters: Any, head: bool) -> None:
    """Change what `ray start` starts; Ray calls this through RAY_START_HOOK.

    There is no option that leaves out the server for remote Ray clients.
    """
    parameters.ray_client_server_port = None


def main() -> None:
    temp_dir, *arguments = sys.argv[1:]
    # Orphans come to this process and not to pid 1, so that it can see to their end.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _run_ray(guard, arguments)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    abandoned = _wait(child)
    _end_session()
    if abandoned:
        shutil.rmtree(Path(temp_dir), ignore_errors=True)


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
