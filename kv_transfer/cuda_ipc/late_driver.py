"""A device made of host memory, whose copies are late and out of order; for tests.

Copies move their bytes only when somebody waits, and then those of others may come first, in an
order drawn from the seed. Who forgets to wait finds old bytes, who forgets to fence finds bytes
that come after the fence, and who unmaps too early is stopped. Other processes open its memory as
they open SharedMemory, by a descriptor of the process that has it.
"""

import ctypes
import os
import random
from dataclasses import dataclass
from threading import Lock

import msgpack

from baton.core.errors import TransportError
from baton.kernels.native.kv_digest import Ints
from baton.kv_transfer.shm.memory import Mapping, SharedMemory


@dataclass(eq=False, slots=True)
class _LateCopy:
    driver: "LateDriver"
    lane: "_LateLane"
    runs: list[tuple[int, int, int]]

    def wait(self) -> None:
        """See CopyEvent."""
        self.driver._complete([self])

    def run(self) -> None:
        for target, source, length in self.runs:
            ctypes.memmove(target, source, length)

    def reads(self, begin: int, end: int) -> bool:
        return any(begin <= source < end for _, source, _ in self.runs)


class LateDriver:
    """Implements `DeviceDriver`."""

    def __init__(self, seed: int = 0) -> None:
        self.copies = 0
        """Begun so far."""
        self._random = random.Random(seed)
        self._lock = Lock()
        self._open: list[_LateCopy] = []
        self._mapped = 0
        self._allocated: list[SharedMemory] = []

    def __repr__(self) -> str:
        return f"<LateDriver, {len(self._open)} copies open, {self._mapped} mappings>"

    def allocate(self, size: int) -> SharedMemory:
        """Return zeroed memory of the make-believe device, which lives as long as the driver."""
        memory = SharedMemory(size)
        self._allocated.append(memory)
        return memory

    @property
    def identity(self) -> str:
        """See DeviceDriver."""
        return "late device"

    def attach(self) -> None:
        """See DeviceDriver."""

    def export(self, address: int, length: int) -> bytes:
        """See DeviceDriver."""
        for memory in self._allocated:
            size = len(memory.buffer)
            offset = address - memory.address
            if 0 <= offset <= size - length:
                handle: bytes = msgpack.packb([os.getpid(), memory.fd, size, offset])
                return handle
        raise TransportError("this memory is not the device's")

    def open(self, handle: bytes, length: int) -> "_LateMemory":
        """See DeviceDriver."""
        try:
            pid, number, size, offset = msgpack.unpackb(handle)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise TransportError("this is no handle of a late device") from error
        if not 0 <= offset <= size - length:
            raise TransportError(f"the handle is not of {length} bytes")
        try:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(f"the peer's memory cannot be opened: {error}") from error
        memory = _LateMemory(self, Mapping(fd, size), offset)
        self._mapped += 1
        return memory

    def open_lane(self) -> "_LateLane":
        """See DeviceDriver."""
        return _LateLane(self)

    def check(self) -> None:
        """Assert that every copy has completed and every mapping is closed."""
        assert not self._open, self
        assert not self._mapped, self

    def _begin(self, copy: _LateCopy) -> None:
        with self._lock:
            self.copies += 1
            self._open.append(copy)

    def _complete(self, copies: list[_LateCopy]) -> None:
        """Let some of the open copies complete, in a wild order, `copies` among them."""
        with self._lock:
            others = self._random.sample(self._open, self._random.randint(0, len(self._open)))
            for copy in (*others, *copies):
                if copy in self._open:
                    self._open.remove(copy)
                    copy.run()

    def _complete_lane(self, lane: "_LateLane") -> None:
        with self._lock:
            left = [copy for copy in self._open if copy.lane is lane]
        self._complete(left)

    def _unmap(self, memory: Mapping) -> None:
        with self._lock:
            begin, end = memory.address, memory.address + memory.length
            busy = any(copy.reads(begin, end) for copy in self._open)
            assert not busy, "unmapped while it is read"
            memory.close()
            self._mapped -= 1


class _LateLane:
    """See CopyLane."""

    def __init__(self, driver: LateDriver) -> None:
        self._driver = driver

    def copy(self, targets: Ints, sources: Ints, lengths: Ints) -> _LateCopy:
        """See CopyLane."""
        runs = list(zip(targets.tolist(), sources.tolist(), lengths.tolist(), strict=True))
        copy = _LateCopy(self._driver, self, runs)
        self._driver._begin(copy)
        return copy

    def close(self) -> None:
        """See CopyLane."""
        self._driver._complete_lane(self)


class _LateMemory:
    """See OpenedMemory."""

    def __init__(self, driver: LateDriver, mapping: Mapping, offset: int) -> None:
        self._driver = driver
        self._mapping = mapping
        self.address = mapping.address + offset

    def close(self) -> None:
        """See OpenedMemory."""
        self._driver._unmap(self._mapping)
