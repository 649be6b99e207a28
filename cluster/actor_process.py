"""What the processes of all our actors have in common; nothing here knows Ray."""

import asyncio
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from baton.cluster.patient_file import PatientFile
from baton.cluster.watched import Watched
from baton.core.errors import InvalidConfig

_DRAIN_VARIABLE = "BATON_DRAIN_S"
_DRAIN_S = 20.0
"""With the time to close, less than Kubernetes gives if it is not told how much."""


class LoopThread:
    """An event loop in a thread of its own: Ray runs an actor's methods in threads of its pool."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name=name, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """Run a coroutine there; from any thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def end_process_if_it_stands_still(self) -> None:
        """Let a watchdog end this process if the loop stands still for four seconds: see Watched.

        Ray then starts the actor again, as after any other end.
        """
        self._watched = Watched(self._loop)


async def or_exit(running: Awaitable[None]) -> None:
    """End this process if what it lives for fails, which is a bug: Ray then starts another."""
    try:
        await running
    except Exception:
        traceback.print_exc()
        os._exit(1)


def write_output_to(path: Path) -> None:
    """Append stdout and stderr, those of native code and of a crash too, to a file.

    A disk that is slow, or stuck, holds up native code alone.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    sys.stdout, sys.stderr = PatientFile(1), PatientFile(2)
    faulthandler.enable(file=2)


def sigterm_drain_s() -> float:
    """Return how many seconds to drain after SIGTERM: 20, or what the node's environment says.

    Raises InvalidConfig if that is no number, or less than 0.
    """
    text = os.environ.get(_DRAIN_VARIABLE, str(_DRAIN_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidConfig(_DRAIN_VARIABLE, text, "seconds, 0 or more")
    return seconds


def leave_on_sigterm(leave: Callable[[], None], within_s: float) -> None:
    """On SIGTERM, call `leave` in a thread, and end this process once it returns or takes too long.

    To be called from an actor's constructor: Ray runs that in the main thread, which alone can take
    signals, and takes them whatever the actor's other threads do.
    """

    def end() -> None:
        leaving = threading.Thread(target=leave, name="leave", daemon=True)
        leaving.start()
        leaving.join(within_s)
        os._exit(0)

    def terminated(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=end, name="end", daemon=True).start()

    signal.signal(signal.SIGTERM, terminated)
