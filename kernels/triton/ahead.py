"""Compiles kernels before they are wanted, while something else is waited for, as are weights.

    calling context   launchers, on tensors of shapes alone ──▶ what they would launch
    threads                                                     compiled, each kernel once
    other contexts    launch as ever

A kernel that is compiled for a tensor without memory is the one for a tensor of the same type and
strides that begins at a multiple of 16 bytes, as nearly all do. What is missed is compiled when it
is launched first.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import triton
from triton.runtime.jit import JITFunction

Told = Callable[[int, int], None]
"""Is called with how many kernels are compiled, of how many that are known to be needed so far."""

_only_compiles: ContextVar[bool] = ContextVar("only_compiles", default=False)
_launch = JITFunction.run
_one_at_a_time = Lock()


@contextmanager
def compiling(threads: int, told: Told) -> Iterator[None]:
    """Let `threads` threads compile what this context would launch, and launch nothing in it.

    Returns from its block once all is compiled. Tensors may be on torch's `meta` device. A kernel
    that does not compile says so when it is launched. `told` is called by those threads, one at a
    time. One process compiles for one context at a time.
    """
    with _one_at_a_time, ThreadPoolExecutor(threads, "kernels") as pool:
        token = _only_compiles.set(True)
        before, JITFunction.run = JITFunction.run, _run
        try:
            with _Counted(pool, told):
                yield
        finally:
            JITFunction.run = before
            _only_compiles.reset(token)


def _run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    """Launch, or, where it is told so, compile."""
    return _launch(kernel, *args, grid=grid, warmup=warmup or _only_compiles.get(), **options)


class _Counted(triton.AsyncCompileMode):  # type: ignore[misc]
    """Compiles in other threads, and counts."""

    def __init__(self, pool: Executor, told: Told) -> None:
        super().__init__(pool, ignore_errors=True)
        self._told = told
        self._lock = Lock()
        self._done = 0

    def submit(self, key: Any, compile_fn: Any, finalize_fn: Any) -> Any:
        known = len(self.raw_futures)
        kernel = super().submit(key, compile_fn, finalize_fn)
        if len(self.raw_futures) > known:
            self.raw_futures[-1].add_done_callback(self._ended)
        return kernel

    def _ended(self, _: "Future[Any]") -> None:
        with self._lock:
            self._done += 1
            self._told(self._done, len(self.raw_futures))
