"""The seam to a GPU: memory that one process lets others map, and copies that run beside the host.

Addresses are those of the device, as plain numbers. `cuda_ipc/libcuda.py` implements it on CUDA,
`cuda_ipc/late_driver.py` on host memory whose copies are late and out of order, for tests.
"""

from typing import Protocol

from baton.kernels.native.kv_digest import Ints


class CopyEvent(Protocol):
    """The end of copies that were begun together."""

    def wait(self) -> None:
        """Return once they are complete; the host sleeps meanwhile. Raises TransportError."""
        ...


class CopyLane(Protocol):
    """Copies that begin in order, beside everybody else's; used by one thread."""

    def copy(self, targets: Ints, sources: Ints, lengths: Ints) -> CopyEvent:
        """Begin to copy runs from addresses to addresses; raises TransportError.

        Runs do not overlap, and either side may be memory that was opened.
        """
        ...

    def close(self) -> None:
        """Return once nothing of this lane is under way, whether it was waited for or not."""
        ...


class OpenedMemory(Protocol):
    """Memory of another process, mapped."""

    @property
    def address(self) -> int:
        """Where what was exported begins here."""
        ...

    def close(self) -> None:
        """Unmap it; nothing may be under way that reads it."""
        ...


class DeviceDriver(Protocol):
    """One device; the methods may be called from any thread."""

    @property
    def identity(self) -> str:
        """Names the device among all devices of the host."""
        ...

    def attach(self) -> None:
        """Make the device that of the calling thread, for libraries that ask which it is."""
        ...

    def export(self, address: int, length: int) -> bytes:
        """Return a handle by which processes of this host can open the memory.

        Whoever has the handle can: it is told only to those who may. Raises TransportError.
        """
        ...

    def open(self, handle: bytes, length: int) -> OpenedMemory:
        """Map memory that another process has exported; raises TransportError."""
        ...

    def open_lane(self) -> CopyLane:
        """Return a lane; raises TransportError."""
        ...
