"""The process that ends its parent, if that stands still: `python watchdog.py PID`; see watched.py.

What is stopped, or waits for what never comes, runs no code that could notice; and Ray notices only
processes that have ended. SIGKILL ends a stopped process too, so that nothing of it goes on later,
when another has its place.

Only the standard library's smallest parts are imported: this starts in 30 ms and takes 10 MiB.
"""

import os
import select
import signal
import sys

SLICE_S = 0.5
"""How long one wait for a beat is; beats come as often."""
_IDLE_SLICES = 8
"""So many in a row without a beat, in which the process wants no CPU either, are its end. They are
counted, and no clock is asked: a machine that stood still has not let them pass."""
_BUSY_SLICES = 120
"""So many if it wants CPU: it may be at work, or get none on a busy machine."""


class Patience:
    """Judges by what was seen in each slice of time whether a process stands still. Pure."""

    def __init__(self) -> None:
        self._silent = 0
        """Slices since the last beat."""
        self._idle = 0
        """Those of them since it last wanted a CPU."""

    def __repr__(self) -> str:
        return f"Patience(silent={self._silent}, idle={self._idle})"

    def heard(self) -> None:
        """Take note of a beat."""
        self._silent = self._idle = 0

    def ends(self, *, busy: bool) -> bool:
        """Take note of a slice without a beat; return whether that is the last one.

        `busy`: the process wanted a CPU at its end.
        """
        self._silent += 1
        self._idle = 0 if busy else self._idle + 1
        return self._idle >= _IDLE_SLICES or self._silent >= _BUSY_SLICES


def main() -> None:
    """Wait for bytes on standard input, until the parent has ended or has to be."""
    parent, patience = int(sys.argv[1]), Patience()
    try:
        process = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    if os.getppid() != parent:
        return  # it has ended, and the pid may be another's
    while True:
        ready, _, _ = select.select((0, process), (), (), SLICE_S)
        if process in ready:
            return
        if ready:
            if not os.read(0, 1 << 12):
                return
            patience.heard()
        elif patience.ends(busy=_wants_cpu(parent)):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            # Only now: the disk below may be what it waits for.
            sys.stderr.write(f"watchdog: ended process {parent}: its event loop stood still\n")
            return


def _wants_cpu(pid: int) -> bool:
    """Return whether any thread of a process runs, or could if it had a CPU."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return False  # it has just ended
    return any(_state(f"/proc/{pid}/task/{thread}/stat") == "R" for thread in threads)


def _state(path: str) -> str:
    """Return the letter of a thread's state; none if it has ended."""
    try:
        with open(path, errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


if __name__ == "__main__":
    main()
