"""A queue on the CPU whose work is done late, by another thread; for tests of who waits for what.

Work is done only once somebody waits for a mark behind it, or when `LIMIT` launches are waiting:
before that, who overwrites an input, or reads a result without its mark, is found out.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import torch
from torch import Tensor

from baton.executor.gpu_queue import Work

LIMIT = 64


class LateQueue:
    """Implements `GpuQueue`; `close` it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="late device")
        self._lock = Lock()
        self._waiting: deque[Work] = deque()
        self._launched = self._done = 0
        self.replays = 0
        """How often captured work was launched."""

    def __repr__(self) -> str:
        return f"<LateQueue, {len(self._waiting)} launches wait>"

    @property
    def device(self) -> torch.device:
        """See GpuQueue."""
        return torch.device("cpu")

    def host_buffer(self, size: int) -> Tensor:
        """See GpuQueue."""
        return torch.zeros(size, dtype=torch.int64)

    def launch(self, work: Work) -> None:
        """See GpuQueue."""
        with self._lock:
            self._waiting.append(work)
            self._launched += 1
            full = len(self._waiting) > LIMIT
        if full:
            self._run(self._launched - LIMIT // 2).result()

    def capture(self, work: Work) -> Work:
        """See GpuQueue."""
        self.launch(work)
        self._run(self._launched).result()

        def replay() -> None:
            self.replays += 1
            self.launch(work)

        return replay

    def record(self) -> "_LateMark":
        """See GpuQueue."""
        return _LateMark(self._run, self._launched)

    def close(self) -> None:
        """Do what was launched and not waited for, and end the thread."""
        self._run(self._launched).result()
        self._thread.shutdown()

    def _run(self, until: int) -> "Future[None]":
        """Let the thread do the first `until` launches ever made, as far as they are not done."""
        return self._thread.submit(self._do, until)

    @torch.inference_mode()
    def _do(self, until: int) -> None:
        while self._done < until:
            with self._lock:
                work = self._waiting.popleft()
            self._done += 1
            work()


class _LateMark:
    def __init__(self, run: Callable[[int], "Future[None]"], until: int) -> None:
        self._run = run
        self._until = until

    def wait(self) -> None:
        """See Mark."""
        self._run(self._until).result()
