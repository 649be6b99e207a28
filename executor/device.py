"""Where a pool may lie if not in this process's host memory, and how bytes get out and in.

Kernels reach a device's memory; of the transports, those that know its driver do. For others, what
is handed over is copied to host memory and read there, and what was read is copied to the device:
executor/staging.py.
"""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from baton.kv_transfer.device_driver import DeviceDriver


class Event(Protocol):
    """The end of a copy, or of what the model has started up to some point."""

    @property
    def done(self) -> bool:
        """Whether it is complete; asking does not block."""
        ...

    def wait(self) -> None:
        """Block, asleep, until it is complete; until then neither side of a copy may be touched."""
        ...


class Device(Protocol):
    """Memory that kernels compute on; the methods may be called from any thread.

    Tensors are flat bytes (uint8). Copies complete when they do, in any order; whoever needs one to
    be complete waits for its event.
    """

    @property
    def driver(self) -> DeviceDriver | None:
        """How transports reach its memory; None if none can."""
        ...

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

    def record(self) -> Event:
        """Return the end of all that the calling thread has started on its current stream.

        For the model's thread: KV is in the pool once the event after its layers is complete.
        """
        ...

    def stream(self, *, outward: bool) -> AbstractContextManager[object]:
        """Let kernels that are started within run beside the model's, before copies that follow.

        They wait for nothing: what they read must be complete, by an event of `record`.
        """
        ...

    def synchronize(self) -> None:
        """Block until what was started under `stream`, and every copy, is complete."""
        ...
