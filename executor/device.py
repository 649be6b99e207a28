"""Where a pool may lie if not in this process's host memory, and how bytes get out and in.

Kernels reach a device's memory; transports do not. What is handed over is therefore copied to host
memory and read there, and what was read is copied to the device: executor/staging.py.
"""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor


class Event(Protocol):
    """The end of a copy."""

    def wait(self) -> None:
        """Block until the copy is complete; until then neither side may be touched."""
        ...


class Device(Protocol):
    """Memory that kernels compute on; the methods may be called from any thread.

    Tensors are flat bytes (uint8). Copies complete when they do, in any order; whoever needs one to
    be complete waits for its event.
    """

    def allocate(self, size: int) -> Tensor:
        """Return `size` zeroed bytes of the device's memory."""
        ...

    def pin(self, memory: Tensor) -> None:
        """Let the device copy from and to this host memory by itself."""
        ...

    def unpin(self, memory: Tensor) -> None:
        """Take that back, before the memory is freed."""
        ...

    def copy_to_host(self, source: Tensor, target: Tensor) -> Event:
        """Begin to copy device memory into pinned host memory of the same size."""
        ...

    def copy_from_host(self, source: Tensor, target: Tensor) -> Event:
        """Begin to copy pinned host memory into device memory of the same size."""
        ...

    def stream(self, *, after_model: bool) -> AbstractContextManager[object]:
        """Let kernels that are started within run beside the model's.

        With `after_model` they wait for all that the model has started so far.
        """
        ...

    def synchronize(self) -> None:
        """Block until what was started under `stream`, and every copy, is complete."""
        ...
