"""Memory of a process that others on the same host can map, and cannot change."""

import ctypes
import fcntl
import mmap
import os
import weakref

import numpy as np

from baton.core.errors import TransportError
from baton.kv_transfer.transport import Region

_FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE of Linux 5.1, which fcntl does not name yet."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _FUTURE_WRITE | fcntl.F_SEAL_SEAL


class SharedMemory:
    """Zeroed memory behind a descriptor, for a KV pool in host memory.

    The seals let this process alone write: whoever is given the descriptor can map it to read
    only, and it cannot be cut short under a reader. It ends with the last process that has it.
    """

    def __init__(self, size: int) -> None:
        """Take `size` bytes; raises OSError if the system has not that much."""
        assert size > 0
        self.fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        self.buffer = mmap.mmap(self.fd, size)
        """Writable; hold this object as long as anything made from it."""
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self.buffer))
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def __repr__(self) -> str:
        return f"<SharedMemory of {len(self.buffer)} bytes>"

    def region(self, keepalive: object = None) -> Region:
        """Return all of it as a region; `keepalive` is what else must live as long."""
        return Region(self.address, len(self.buffer), (self, keepalive), self.fd)


class Mapping:
    """Another process's SharedMemory, mapped to read."""

    def __init__(self, fd: int, length: int) -> None:
        """Take over `fd`; raises TransportError if it is not memory of `length` bytes that stays.

        Without the seal, a peer that cut its memory short would kill its readers.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if not seals & fcntl.F_SEAL_SHRINK or os.fstat(fd).st_size != length:
                raise TransportError(f"the peer's memory is not sealed at {length} bytes")
            self._map = mmap.mmap(fd, length, prot=mmap.PROT_READ)
        except OSError as error:
            raise TransportError(f"the peer's memory cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        self.address = _address_of(self._map)
        self.length = length

    def close(self) -> None:
        """Unmap; the address is of no use any more."""
        self._map.close()


def _address_of(mapping: mmap.mmap) -> int:
    view = np.frombuffer(mapping, np.uint8)
    return int(view.ctypes.data)
