"""The connection between an instance's leader and another of its ranks: messages, both ways.

    rank 1 ── connects, both prove that they know the cluster's secret ──▶ rank 0, the leader
           ◀──────────────── messages and heartbeats ─────────────────────▶

A message is 4 bytes of length and as many of msgpack; one of length 0 is a heartbeat. The end of
the connection is the end of the other process, and is noticed at once. One that is stopped, or
whose machine has gone, is noticed by its silence.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import msgpack

from baton.core.errors import PeerLost, TransportError
from baton.kv_transfer.link.auth import Parties, prove_as_owner, prove_as_reader
from baton.kv_transfer.link.stream import limit_waits, send_from, wake

MAX_MESSAGE = 1 << 28
"""Bytes of a message at most: the KV digests of a very long prompt need a few MiB."""
TICK_S = 1.0
"""How often each side sends a heartbeat, and looks for those of the other."""

_KIND = "control"
_LENGTH = struct.Struct(">I")
_PROOF_S = 10.0


class ControlLink:
    """One side of a connection whose other side has proved who it is."""

    def __init__(
        self,
        connection: socket.socket,
        *,
        silence_s: float,
        on_message: Callable[[Any], None],
        on_end: Callable[[str], None],
    ) -> None:
        """Both callbacks come from the thread that is in `run`, `on_end` perhaps from a sender.

        `on_end` is told why the connection has ended, or that the other side was silent for
        `silence_s`; once at most, and never after `close`.
        """
        self._connection = connection
        self._ticks = max(2, round(silence_s / TICK_S))
        self._on_message = on_message
        self._on_end = on_end
        self._sending = threading.Lock()
        self._ending = threading.Lock()
        self._ended = False
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit_waits(connection, TICK_S)

    def __repr__(self) -> str:
        return f"<ControlLink {'ended' if self._ended else 'open'}>"

    def send(self, message: Any) -> None:
        """Send a message; what cannot be sent ends the connection."""
        self.send_packed(packed(message))

    def send_packed(self, body: bytes) -> None:
        """Send what `packed` returned; for one message on many connections."""
        self._send(_LENGTH.pack(len(body)), body)

    def beat(self) -> None:
        """Let the other side know that this one is alive; call it every TICK_S."""
        self._send(_LENGTH.pack(0))

    def run(self) -> None:
        """Take messages until the connection ends; blocks."""
        try:
            while True:
                (length,) = _LENGTH.unpack(self._receive(_LENGTH.size))
                if length > MAX_MESSAGE:
                    raise PeerLost(f"a message of {length} bytes; at most {MAX_MESSAGE} is allowed")
                if length:
                    self._on_message(msgpack.unpackb(self._receive(length), strict_map_key=False))
        except (OSError, TransportError) as error:
            self._end(str(error))
        except Exception as error:  # a message that is none, or a bug in who takes it
            self._end(repr(error))
            raise

    def close(self) -> None:
        """End the connection; `run` returns."""
        with self._ending:
            self._ended = True
        wake(self._connection)

    def _send(self, *parts: bytes) -> None:
        try:
            with self._sending:
                send_from(self._connection, parts)
        except (OSError, TransportError) as error:
            self._end(str(error))

    def _end(self, reason: str) -> None:
        with self._ending:
            first, self._ended = not self._ended, True
        if first:
            wake(self._connection)
            self._on_end(reason)

    def _receive(self, size: int) -> bytearray:
        """Return the next `size` bytes.

        Silence is counted in waits that ended without a byte, and not by the clock: if it was this
        process that stood still, what the other one has sent meanwhile is here at the next wait.
        """
        data = bytearray(size)
        view, got, silent = memoryview(data), 0, 0
        while got < size:
            try:
                count = self._connection.recv_into(view[got:])
            except BlockingIOError:
                silent += 1
                if silent >= self._ticks:
                    waited = self._ticks * TICK_S
                    raise PeerLost(f"it has been silent for {waited:g} s") from None
                continue
            if count == 0:
                raise PeerLost("its connection ended")
            got, silent = got + count, 0
        return data


def packed(message: Any) -> bytes:
    """Return a message as it travels."""
    body: bytes = msgpack.packb(message)
    assert len(body) <= MAX_MESSAGE, f"a message of {len(body)} bytes"
    return body


def connect(address: tuple[str, int], secret: bytes, parties: Parties) -> socket.socket:
    """Connect to the leader (`parties.owner`) as `parties.reader`.

    Raises TransportError if it is not there, is another one, or does not know the secret.
    """
    deadline = time.monotonic() + _PROOF_S
    try:
        connection = socket.create_connection(address, timeout=_PROOF_S)
    except OSError as error:
        raise PeerLost(f"the leader at {address[0]}:{address[1]}: {error}") from None
    try:
        prove_as_reader(connection, secret, _KIND, parties, deadline)
    except BaseException:
        connection.close()
        raise
    return connection


def accept(connection: socket.socket, secret: bytes, owner: tuple[str, int]) -> str:
    """Let a rank in as the leader `owner` (name, incarnation); return its name.

    Raises TransportError if it does not know the secret or looks for another leader.
    """
    deadline = time.monotonic() + _PROOF_S
    return prove_as_owner(connection, secret, _KIND, owner, deadline).reader
