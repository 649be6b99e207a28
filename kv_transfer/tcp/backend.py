"""Runs over a TCP connection: the reader names them, the owner of the memory checks and sends them.

    request   ticket, u32 number of runs, then (u64 offset, u64 length) of each in the region
    answer    u8: 1 and the bytes of all runs in this order, 2 and as many zeros if the ticket does
              not open them, or 0 and the end of the connection if they leave the region

Bytes go from region to region: the owner sends from its own and the reader receives into its own,
a whole part in one system call on either side.
"""

import ctypes
import socket
import struct

import numpy as np

from baton.core.errors import PeerLost, TransportError
from baton.core.ids import Ticket
from baton.kv_transfer.grants import Grants
from baton.kv_transfer.link.backend import MAX_BYTES, MAX_RUNS, Channel, ReadRefused
from baton.kv_transfer.link.stream import STALL_S, receive_into, send_from
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import Metadata, Region

_HEAD = struct.Struct(">16sI")
_OFFSETS = np.dtype(">u8")
_RUN_BYTES = 16
_OK, _REFUSED, _NOT_GRANTED, _NO_ANSWER = b"\x01", b"\x00", b"\x02", b"\xff"
_ZEROS = memoryview(bytes(1 << 20))

_CUT_S = 2.0
"""The reader gives up a peer of whose host nothing came for so long."""

_Runs = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]


class TcpBackend:
    """Listens at one address; see Backend."""

    kind = "tcp"

    def __init__(self, region: Region, host: str, grants: Grants | None = None) -> None:
        """`host` is the address by which peers reach this process.

        `grants` says what each ticket opens; without it every reader reads what it likes.
        """
        self._memory = view_of(region)
        self.grants = grants
        self._host = host

    def listen(self) -> tuple[socket.socket, bytes]:
        """See Backend. Takes a free port."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, 0), family=family, backlog=128)
        port = listener.getsockname()[1]
        return listener, f"{self._host} {port}".encode()

    def dial(self, address: bytes, timeout: float) -> socket.socket:
        """See Backend."""
        host, _, port = address.decode(errors="replace").partition(" ")
        if not port.isdecimal():
            raise TransportError(f"{address!r} is no address for TCP")
        connection = socket.create_connection((host, int(port)), timeout)
        notice_cuts(connection, _CUT_S)
        return connection

    def open(self, connection: socket.socket, theirs: Metadata) -> Channel:
        """See Backend."""
        return _TcpChannel(connection, self._memory)

    def serve(self, connection: socket.socket) -> None:
        """See Backend."""
        # Longer than the reader's own limit: it may be slow to take bytes, and is not yet lost.
        notice_cuts(connection, STALL_S)
        while (request := _next_request(connection)) is not None:
            ticket, runs = request
            if not _allowed(runs, len(self._memory)):
                connection.sendall(_REFUSED)
                raise TransportError("a reader asked for what is not in the region")
            if not self._opens(ticket, runs):
                _refuse(connection, int(runs[:, 1].sum()))
                continue
            pieces = [self._memory[begin : begin + size] for begin, size in runs.tolist()]
            send_from(connection, [_OK, *pieces])

    def _opens(self, ticket: Ticket, runs: _Runs) -> bool:
        offsets, lengths = runs.astype(np.int64).T
        return self.grants is None or self.grants.allow(ticket, offsets, lengths)


class _TcpChannel:
    """See Channel."""

    carrier = "tcp"

    def __init__(self, connection: socket.socket, memory: memoryview) -> None:
        self._connection = connection
        self._memory = memory

    def ask(self, part: RunTable, ticket: Ticket) -> None:
        """See Channel."""
        wanted = np.stack([part.remote, part.length], axis=1).astype(_OFFSETS)
        self._connection.sendall(_HEAD.pack(ticket, len(part)) + wanted.tobytes())

    def receive(self, part: RunTable) -> None:
        """See Channel."""
        memory = self._memory
        begins, ends = part.local.tolist(), (part.local + part.length).tolist()
        into = [memory[begin:end] for begin, end in zip(begins, ends, strict=True)]
        answer = bytearray(_NO_ANSWER)
        try:
            receive_into(self._connection, [memoryview(answer), *into])
        except PeerLost:
            if answer == _REFUSED:
                raise TransportError("it refuses a run that leaves its region") from None
            raise
        if answer == _NOT_GRANTED:
            raise ReadRefused("it refuses a read that the ticket does not open, or not any more")

    def close(self) -> None:
        """See Channel. There is nothing but the connection."""


def view_of(region: Region) -> memoryview:
    """Return the region's bytes, writable, without a copy; `region` must outlive it."""
    return memoryview((ctypes.c_ubyte * region.length).from_address(region.address)).cast("B")


def notice_cuts(connection: socket.socket, seconds: float) -> None:
    """Send small requests at once, and fail in about `seconds` if the other host is cut off.

    Keepalive asks while nothing is sent, the user time-out limits what is sent and not
    acknowledged. A process that merely hangs is not noticed by either: its kernel answers.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def _refuse(connection: socket.socket, size: int) -> None:
    """Answer with zeros, so that what the reader has asked for after this keeps its place."""
    zeros = [_ZEROS[: min(len(_ZEROS), size - at)] for at in range(0, size, len(_ZEROS))]
    send_from(connection, [_NOT_GRANTED, *zeros])


def _next_request(connection: socket.socket) -> tuple[Ticket, _Runs] | None:
    """Return a ticket and runs [runs, (offset, length)]; None when the reader has gone."""
    head = bytearray(_HEAD.size)
    received = _wait_for_request(connection, head)
    if not received:
        return None
    receive_into(connection, [memoryview(head)[received:]])
    ticket, count = _HEAD.unpack(head)
    if not 0 < count <= MAX_RUNS:
        raise TransportError(f"a reader asked for {count} runs; 1 to {MAX_RUNS} are allowed")
    body = bytearray(count * _RUN_BYTES)
    receive_into(connection, [memoryview(body)])
    return Ticket(ticket), np.frombuffer(body, _OFFSETS).astype(np.uint64).reshape(count, 2)


def _wait_for_request(connection: socket.socket, head: bytearray) -> int:
    """Receive the first bytes of a request, however long it takes; 0 at the end.

    If the reader's host is cut off meanwhile, keepalive ends it.
    """
    while True:
        try:
            return connection.recv_into(head, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            continue


def _allowed(runs: _Runs, length: int) -> bool:
    """Return True if every run is in the region, and all together are not too long to send."""
    offsets, sizes = runs[:, 0], runs[:, 1]
    if (sizes == 0).any() or (sizes > length).any() or sizes.sum() > MAX_BYTES:
        return False
    return bool((offsets <= length - sizes).all())
