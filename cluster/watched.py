"""This process's side of its watchdog: its event loop says twice a second that it goes round."""

import asyncio
import os
import subprocess
import sys

from baton.cluster import watchdog
from baton.core.log import get_logger

_SETTLES_S = 2.0
"""For a new watchdog, so that one which cannot run here is not started twice a second."""

_log = get_logger("watchdog")


class Watched:
    """Ends this process if an event loop in it stands still; see watchdog.py.

    So it is for the controller and the gateways, which Ray starts again: a controller adopts whom
    it finds, and a gateway that stands still serves nobody. Instances have leases.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop runs, in any thread."""
        self._loop = loop
        self._dog = _start()
        loop.call_soon_threadsafe(self._beat)

    def __repr__(self) -> str:
        return f"Watched(watchdog={self.pid})"

    @property
    def pid(self) -> int:
        """Of the watchdog."""
        return self._dog.pid

    def _beat(self) -> None:
        assert self._dog.stdin is not None
        try:
            os.write(self._dog.stdin.fileno(), b".")
        except BlockingIOError:
            pass  # the watchdog stands still itself, and has enough to read
        except BrokenPipeError:  # it has ended, as somebody may have wanted
            self._loop.run_in_executor(None, self._start_again)
            return
        self._loop.call_later(watchdog.SLICE_S, self._beat)

    def _start_again(self) -> None:
        before = self._dog
        assert before.stdin is not None
        try:
            self._dog = _start()
        except OSError as error:  # the next beat breaks the same pipe, and comes back here
            _log.error("no watchdog can be started", reason=str(error))
        else:
            _log.warning("the watchdog had ended; there is another", pid=self.pid)
            before.stdin.close()
            before.wait()
        self._loop.call_soon_threadsafe(self._loop.call_later, _SETTLES_S, self._beat)


def _start() -> "subprocess.Popen[bytes]":
    dog = subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid())],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        process_group=0,  # what stops the group of this process does not stop it
    )
    assert dog.stdin is not None
    os.set_blocking(dog.stdin.fileno(), False)
    return dog
