"""Reads of a pool in GPU memory by another process of the same host, over NVLink, PCIe or nothing.

The owner exports its region once and tells the handle to those who have proved, over a Unix socket
as of shm, that they know the cluster's secret: who has the handle can read all of it, so it is no
part of the metadata. The reader maps the region and copies from it on a lane of its own.

    reader's thread   ask ─▶ copies begin on the lane ── event ─▶ receive sleeps until it is over
    fence             the connection is shut down, the lane runs empty, the mapping is closed

The owner's processors do nothing, and its streams wait for nobody. When it dies the connection
ends, and what was read and not yet told is worth nothing.
"""

import socket
import struct
from collections import deque

from baton.core.errors import PeerLost, TransportError
from baton.core.ids import Ticket
from baton.kv_transfer.device_driver import CopyEvent, CopyLane, DeviceDriver, OpenedMemory
from baton.kv_transfer.link.backend import Channel
from baton.kv_transfer.link.local import dial_locally, listen_locally, until_hung_up
from baton.kv_transfer.link.stream import hung_up
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import Metadata, Region

_TOLD = struct.Struct(">QHH")
"""What the owner says first: the length of its region, of the handle, and of the device's name."""


class CudaIpcBackend:
    """See Backend; the region lies on a device."""

    kind = "cuda_ipc"

    def __init__(self, region: Region) -> None:
        """Export `region`; raises TransportError if its device or its memory does not allow it."""
        assert region.device is not None, "a region in host memory"
        self._region = region
        self._device: DeviceDriver = region.device
        self._handle = self._device.export(region.address, region.length)

    def listen(self) -> tuple[socket.socket, bytes]:
        """See Backend."""
        return listen_locally()

    def dial(self, address: bytes, timeout: float) -> socket.socket:
        """See Backend."""
        return dial_locally(address, timeout)

    def open(self, connection: socket.socket, theirs: Metadata) -> Channel:
        """See Backend."""
        length, *sizes = _TOLD.unpack(_received(connection, _TOLD.size))
        handle, device = (_received(connection, size) for size in sizes)
        if length != theirs.length:
            raise TransportError(f"its memory is not the {theirs.length} bytes it was said to be")
        try:
            memory = self._device.open(handle, length)
        except TransportError as error:
            both = f"memory of {device.decode(errors='replace')} on {self._device.identity}"
            raise TransportError(f"{both} cannot be opened: {error}") from error
        try:
            lane = self._device.open_lane()
        except BaseException:
            memory.close()
            raise
        return _CudaIpcChannel(connection, self._region.address, memory, lane)

    def serve(self, connection: socket.socket) -> None:
        """See Backend. The connection ends when either side does."""
        handle, device = self._handle, self._device.identity.encode()
        told = _TOLD.pack(self._region.length, len(handle), len(device))
        connection.sendall(told + handle + device)
        until_hung_up(connection)


class _CudaIpcChannel:
    """Copies from mapped memory of a device; see Channel."""

    carrier = "cuda_ipc"

    def __init__(
        self, connection: socket.socket, local: int, memory: OpenedMemory, lane: CopyLane
    ) -> None:
        self._connection = connection
        self._local = local
        self._memory = memory
        self._lane = lane
        self._asked: deque[CopyEvent] = deque()

    def ask(self, part: RunTable, ticket: Ticket) -> None:
        """See Channel."""
        targets, sources = part.local + self._local, part.remote + self._memory.address
        self._asked.append(self._lane.copy(targets, sources, part.length))

    def receive(self, part: RunTable) -> None:
        """See Channel. The thread sleeps until the device says that the copies are over."""
        self._asked.popleft().wait()
        if hung_up(self._connection):
            raise PeerLost("the owner of the memory is gone")

    def close(self) -> None:
        """See Channel: returns once nothing is written any more, which makes it a fence."""
        try:
            self._lane.close()
        finally:
            self._memory.close()


def _received(connection: socket.socket, size: int) -> bytes:
    received = connection.recv(size, socket.MSG_WAITALL)
    if len(received) != size:
        raise PeerLost("it closed the connection")
    return received
