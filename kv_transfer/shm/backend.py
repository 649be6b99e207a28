"""Reads between processes of one host: who connects by a Unix socket is given the memory.

SharedMemory is mapped by the reader: the fastest way, and one that needs no right but the
descriptor. Other memory is read by the kernel (process_vm_readv), which needs the same user and the
right to trace. The connection stays open: when it ends, the owner of the memory has ended.
"""

import socket
import struct

from baton.core.errors import PeerLost, TransportError
from baton.core.ids import Ticket
from baton.kernels.kv_digest import Digests, copy_and_hash, is_native
from baton.kv_transfer.link.backend import Channel
from baton.kv_transfer.link.local import dial_locally, listen_locally, until_hung_up
from baton.kv_transfer.link.stream import hung_up
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.shm.copying import bytes_at, copy_mapped, read_process
from baton.kv_transfer.shm.memory import Mapping
from baton.kv_transfer.transport import Metadata, ReadUnits, Region

_TOLD = struct.Struct("@cQQ")
"""What the owner of the memory says first: how to read it, where it begins, how long it is."""
_MAPPED, _BY_KERNEL = b"m", b"k"
_CREDENTIALS = struct.Struct("3i")


class ShmBackend:
    """Listens at a name of its own in the network namespace; see Backend."""

    kind = "shm"

    def __init__(self, region: Region) -> None:
        self._region = region

    def listen(self) -> tuple[socket.socket, bytes]:
        """See Backend."""
        return listen_locally()

    def dial(self, address: bytes, timeout: float) -> socket.socket:
        """See Backend."""
        return dial_locally(address, timeout)

    def open(self, connection: socket.socket, theirs: Metadata) -> Channel:
        """See Backend."""
        told, descriptors, _, _ = socket.recv_fds(connection, _TOLD.size, 1)
        if len(told) != _TOLD.size:
            raise PeerLost("it closed the connection")
        how, base, length = _TOLD.unpack(told)
        if how == _MAPPED and len(descriptors) == 1:
            kind = _HashingChannel if is_native() else _MappedChannel
            return kind(connection, self._region, Mapping(descriptors[0], theirs.length))
        if how != _BY_KERNEL or (base, length) != (theirs.base, theirs.length):
            raise TransportError(f"its memory is not the {theirs.length} bytes it was said to be")
        return _ProcessChannel(connection, self._region, theirs)

    def serve(self, connection: socket.socket) -> None:
        """See Backend. The reader sends nothing; the connection ends when either side does."""
        region = self._region
        how = _BY_KERNEL if region.fd is None else _MAPPED
        told = _TOLD.pack(how, region.address, region.length)
        socket.send_fds(connection, [told], [] if region.fd is None else [region.fd])
        until_hung_up(connection)


class _MappedChannel:
    """Copies from the mapped memory of the peer; see Channel."""

    carrier = "shm"

    def __init__(self, connection: socket.socket, region: Region, mapping: Mapping) -> None:
        self._connection = connection
        self._local = region.address
        self._mapping = mapping

    def ask(self, part: RunTable, ticket: Ticket) -> None:
        """See Channel. Nobody must be asked."""

    def receive(self, part: RunTable) -> None:
        """See Channel. The memory outlives its owner; what it held then is worth nothing."""
        copy_mapped(part, self._local, self._mapping.address)
        self._ensure_live()

    def close(self) -> None:
        """See Channel."""
        self._mapping.close()

    def _ensure_live(self) -> None:
        if hung_up(self._connection):
            raise PeerLost("the owner of the memory is gone")


class _HashingChannel(_MappedChannel):
    """Hashes while it copies, if it is asked to; see HashingChannel."""

    def __init__(self, connection: socket.socket, region: Region, mapping: Mapping) -> None:
        super().__init__(connection, region, mapping)
        self._target = bytes_at(region.address, region.length)
        self._source = bytes_at(mapping.address, mapping.length)

    def receive_units(self, units: ReadUnits) -> Digests:
        """See HashingChannel. One call of native code, as of copies without hashes."""
        hashes = copy_and_hash(
            units.key, self._target, units.into, self._source, units.pieces, units.labels
        )
        self._ensure_live()
        return hashes


class _ProcessChannel:
    """Has the kernel copy from the peer's address space; see Channel."""

    carrier = "shm-cma"

    def __init__(self, connection: socket.socket, region: Region, theirs: Metadata) -> None:
        self._connection = connection
        self._local = region.address
        self._remote = theirs.base
        # Of the process that listens, in this one's numbers; the kernel vouches for it.
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        self._pid = _CREDENTIALS.unpack(credentials)[0]
        if self._pid == 0:
            raise TransportError("its process namespace cannot be seen from here")

    def ask(self, part: RunTable, ticket: Ticket) -> None:
        """See Channel. Nobody must be asked."""

    def receive(self, part: RunTable) -> None:
        """See Channel. Once the owner is gone its number may be another process's."""
        read_process(part, self._pid, self._local, self._remote)
        if hung_up(self._connection):
            raise PeerLost(f"process {self._pid} is gone")

    def close(self) -> None:
        """See Channel. There is nothing but the connection."""
