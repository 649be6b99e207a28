"""Blocking sockets with a limit on every wait, and without a copy in Python."""

import contextlib
import socket
import struct
import time
from collections.abc import Sequence

from baton.core.errors import PeerLost

STALL_S = 10.0
"""A connection on which not a byte moves for so long, though one is due, is given up."""

_TIMEVAL = struct.Struct("@ll")


def limit_waits(connection: socket.socket, seconds: float) -> None:
    """Let each system call on `connection` wait for `seconds` at most.

    By the kernel, and not by Python's settimeout: that makes the socket non-blocking, and then
    MSG_WAITALL, which fills many buffers in one call, has no effect.
    """
    connection.settimeout(None)
    limit = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def receive_exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Return `size` bytes; raises PeerLost if they are not here at `deadline` (time.monotonic)."""
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise PeerLost("the other side took too long to answer")
        limit_waits(connection, max(left, 0.001))
        with contextlib.suppress(BlockingIOError):
            count = connection.recv_into(view[got:])
            if count == 0:
                raise PeerLost("the other side closed the connection")
            got += count
    return bytes(data)


def receive_into(connection: socket.socket, buffers: Sequence[memoryview]) -> None:
    """Fill all `buffers` (at most 1,024), in one system call if nothing disturbs it.

    Raises PeerLost at the end of the stream, or if not a byte comes within the limit on waits.
    """
    waiting = [buffer for buffer in buffers if len(buffer)]
    while waiting:
        try:
            count = connection.recvmsg_into(waiting, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            raise PeerLost("not a byte came in time") from None
        if count == 0:
            raise PeerLost("the other side closed the connection")
        waiting = _rest(waiting, count)


def send_from(connection: socket.socket, buffers: Sequence[memoryview | bytes]) -> None:
    """Send all `buffers` (at most 1,024), in one system call if nothing disturbs it.

    Raises PeerLost if not a byte goes within the limit on waits.
    """
    waiting = [memoryview(buffer) for buffer in buffers]
    while waiting:
        try:
            count = connection.sendmsg(waiting)
        except BlockingIOError:
            raise PeerLost("not a byte was taken in time") from None
        waiting = _rest(waiting, count)


def hung_up(connection: socket.socket) -> bool:
    """Return True if the other side has ended; its process, if no other has the socket."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def wake(connection: socket.socket) -> None:
    """End every wait on `connection`, in whatever thread; what is read next is its end."""
    with contextlib.suppress(OSError):  # not connected, or closed already
        connection.shutdown(socket.SHUT_RDWR)


def _rest(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of `buffers` after `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []
