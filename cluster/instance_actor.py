"""The inside of a rank's process: hosts one worker on an event loop in a thread of its own.

Ray runs each of these methods in a thread of its pool; nothing here knows Ray.
"""

import importlib
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, Self

from baton.cluster.actor_process import (
    LoopThread,
    leave_on_sigterm,
    sigterm_drain_s,
    write_output_to,
)
from baton.core import log
from baton.core.config import LeaderRef, WorkerConfig
from baton.core.errors import BatonError, InstanceLost, InternalError
from baton.core.topology import InstanceInfo, RankInfo

CALLS_AT_ONCE = 12
"""Threads that the actor needs: start, progress, leader, started, wait_closed, stats, drain and
close overlap, and some of them twice while one controller takes over from another."""
_CLOSE_S = 8.0
"""For the worker to close after SIGTERM, once it has drained."""


class Worker(Protocol):
    """What PrefillWorker, DecodeWorker and Follower have in common."""

    @classmethod
    async def start(
        cls,
        config: WorkerConfig,
        *,
        on_progress: Callable[[str], None],
        on_listening: Callable[[LeaderRef], None],
    ) -> Self: ...
    @property
    def info(self) -> InstanceInfo | RankInfo: ...
    async def close(self) -> None: ...
    def stats(self) -> dict[str, float | int | str]: ...


class InstanceActor:
    """Hosts one worker; `start` it once, `close` it once."""

    def __init__(self, log_path: Path) -> None:
        write_output_to(log_path)
        log.configure()
        self._loop = LoopThread("worker-loop")
        self._worker: Worker | None = None
        self._starting: Future[Any] | None = None
        self._lines: list[str] = []
        self._leader: LeaderRef | None = None
        self._news = threading.Condition()
        self._begun = False
        self._settled = False
        self._closed = threading.Event()
        self._drain_s = sigterm_drain_s()
        leave_on_sigterm(self._drain_and_close, self._drain_s + _CLOSE_S)

    def start(self, factory: str, config: WorkerConfig) -> InstanceInfo | RankInfo:
        """Start the worker class named `module:Class`, and return what it says of itself.

        Raises the worker's BatonError, or InternalError; the log has the trace.
        """
        self._begun = True
        try:
            self._say("importing the model's libraries")
            kind = _load(factory)
            self._starting = self._loop.run(
                kind.start(config, on_progress=self._say, on_listening=self._listening)
            )
            self._worker = self._starting.result()
            return self._worker.info
        except BaseException as error:
            traceback.print_exc()
            if isinstance(error, BatonError):
                raise
            raise InternalError(f"{type(error).__name__}: {error}") from None
        finally:
            self._settle()

    def progress(self, seen: int) -> list[str]:
        """Wait for progress lines beyond the first `seen`; none means that starting has ended."""
        with self._news:
            self._news.wait_for(lambda: len(self._lines) > seen or self._settled)
            return self._lines[seen:]

    def leader(self) -> LeaderRef | None:
        """Wait until the worker waits for other ranks, and return where; None if it never does."""
        with self._news:
            self._news.wait_for(lambda: self._leader is not None or self._settled)
            return self._leader

    def begun(self) -> bool:
        """Return whether it was told to start; a controller may end before it has said so."""
        return self._begun

    def started(self) -> InstanceInfo | RankInfo:
        """Wait until the worker has started, whoever asked for it, and return what it says of it.

        Raises InstanceLost if it did not start.
        """
        with self._news:
            self._news.wait_for(lambda: self._settled)
        if self._worker is None or self._closed.is_set():
            raise InstanceLost("its worker does not run")
        return self._worker.info

    def wait_closed(self, within_s: float) -> bool:
        """Return whether the worker has been closed, as soon as it is, after `within_s` at most.

        Its caller waits for this call to fail: that is how a death is noticed within 0.05 s.
        """
        return self._closed.wait(within_s)

    def stats(self) -> dict[str, float | int | str]:
        """Return the worker's counters; empty before it is ready."""
        worker = self._worker
        return self._loop.run(_stats(worker)).result() if worker else {}

    def drain(self, deadline_s: float) -> None:
        """Let the worker take no more requests, and end or move those that are open."""
        leader: Any = self._worker
        # Other ranks than the leader have no requests.
        if leader is not None and isinstance(leader.info, InstanceInfo):
            self._loop.run(leader.drain(deadline_s)).result()

    def close(self) -> None:
        """Close the worker, or give up starting it."""
        try:
            if self._worker is not None:
                self._loop.run(self._worker.close()).result()
            elif self._starting is not None:
                self._starting.cancel()
        finally:
            self._closed.set()

    def _drain_and_close(self) -> None:
        try:
            self.drain(self._drain_s)
        finally:
            self.close()

    def _say(self, line: str) -> None:
        with self._news:
            self._lines.append(line)
            self._news.notify_all()

    def _listening(self, leader: LeaderRef) -> None:
        with self._news:
            self._leader = leader
            self._news.notify_all()

    def _settle(self) -> None:
        with self._news:
            self._settled = True
            self._news.notify_all()


async def _stats(worker: Worker) -> dict[str, float | int | str]:
    return worker.stats()


def _load(factory: str) -> type[Worker]:
    module, _, name = factory.partition(":")
    found: type[Worker] = getattr(importlib.import_module(module), name)
    return found
