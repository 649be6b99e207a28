"""The end of a log, for whoever cannot wait for a disk: an event loop, say."""

import asyncio
import os
import threading
from concurrent.futures import Future
from pathlib import Path

_PATIENCE_S = 2.0
_READ_BYTES = 1 << 16


async def tail_of(path: Path, count: int) -> list[str]:
    """Return the last `count` lines of a file, or one that says why it cannot be read in time.

    None if there is no file. No thread that reads keeps this process from its end.
    """
    found: Future[list[str]] = Future()
    found.set_running_or_notify_cancel()  # who waits may give up; the thread does not
    threading.Thread(target=_read, args=(path, found), name="log-tail", daemon=True).start()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            return (await asyncio.wrap_future(found))[-count:]
    except TimeoutError:
        return [f"({path} could not be read in {_PATIENCE_S:g} s)"]


def _read(path: Path, found: Future[list[str]]) -> None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _READ_BYTES))
            found.set_result(file.read(_READ_BYTES).decode(errors="replace").splitlines())
    except FileNotFoundError:
        found.set_result([])
    except OSError as error:
        found.set_result([f"({path} cannot be read: {error.strerror})"])
