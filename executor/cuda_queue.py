"""A GPU's queue of work: the default stream, and CUDA graphs that share one pool of memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from baton.executor.gpu_queue import Work

_WARM_UPS = 2
"""Runs before a capture: the first compiles kernels and makes cuBLAS's workspace."""


class CudaQueue:
    """Implements `GpuQueue` on the default stream, which executor/cuda_device.py waits for."""

    def __init__(self, index: int = 0) -> None:
        """Raises RuntimeError, as torch does, if there is no such device."""
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.default_stream(self._device)
        self._capturing = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __repr__(self) -> str:
        return f"<CudaQueue {self._device}>"

    @property
    def device(self) -> torch.device:
        """See GpuQueue."""
        return self._device

    def host_buffer(self, size: int) -> Tensor:
        """See GpuQueue."""
        with torch.cuda.device(self._device):
            return torch.zeros(size, dtype=torch.int64, pin_memory=True)

    @torch.inference_mode()
    def launch(self, work: Work) -> None:
        """See GpuQueue."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            work()

    @torch.inference_mode()
    def capture(self, work: Work) -> Callable[[], None]:
        """See GpuQueue: graphs of one pool overlay their memory, as they never run side by side."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._capturing.wait_stream(self._stream)
            with torch.cuda.stream(self._capturing):
                for _ in range(_WARM_UPS):
                    work()
            torch.cuda.synchronize(self._device)
            # Thread-local: transports and copies of other threads may call CUDA meanwhile.
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._capturing,
                capture_error_mode="thread_local",
            ):
                work()
        return lambda: self.launch(graph.replay)

    def record(self) -> "CudaMark":
        """See GpuQueue."""
        return CudaMark(self._stream)


class CudaMark:
    """An event in a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # Blocking: the thread that waits for a step's tokens sleeps, and leaves its core to others.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        """See Mark."""
        self._event.synchronize()
