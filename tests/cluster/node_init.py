"""Pid 1 of a node: `python node_init.py STATE OWN HOSTNAME` mounts what is the node's, and reaps.

Orphans of a process namespace come to its pid 1; a raylet whose workers stay zombies never learns
that they have ended. When this process ends, the kernel kills all others of the node; it ends with
its standard input, so that no node outlives the tests, whatever ends those.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

READY = "ready"
BOOT_ID = "/proc/sys/kernel/random/boot_id"


def main() -> None:
    state, own, hostname = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    socket.sethostname(hostname)
    _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", "/dev/shm")
    # Ray's files lie at the same path on all its nodes, and must not be the same files.
    _mount("--bind", str(state / "own"), own)
    # By this processes see whether they are on one host.
    _mount("--bind", str(state / "boot_id"), BOOT_ID)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    threading.Thread(target=_end_with_input, daemon=True).start()
    sys.stdout.write(READY + "\n")
    sys.stdout.flush()
    while True:
        signal.sigwait({signal.SIGCHLD})
        _reap()


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main()
