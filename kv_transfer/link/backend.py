"""What a kind of link must bring: how to reach a process, how to serve it, how to read from it."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from baton.core.ids import Ticket
from baton.kernels.kv_digest import Digests, Pieces
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import Metadata, ReadUnits

MAX_RUNS = 512
"""Runs in one part of a transfer; the kernel takes 1,024 buffers in one call."""
MAX_BYTES = 256 << 20
"""Bytes in one part. A fence of a mapped peer waits for one copy, so for less than a tenth of a
second; in smaller pieces memmove does not bypass the cache, and has two thirds of the speed."""


class ReadRefused(Exception):
    """The ticket does not open what was to be read."""


class Channel(Protocol):
    """The reader's end of a connection that has been authenticated; used by one thread.

    Parts are asked for and received in the same order; several may be under way.
    """

    @property
    def carrier(self) -> str:
        """What moves the bytes, for the report."""

    def ask(self, part: RunTable, ticket: Ticket) -> None:
        """Begin to read `part` by `ticket`; waits for the peer at most shortly."""

    def receive(self, part: RunTable) -> None:
        """Return when `part`, the oldest asked for, is in local memory.

        Raises ReadRefused if the ticket does not open it: what follows can still be received.
        Raises PeerLost if the peer has gone, TransportError or OSError if the read failed.
        """

    def close(self) -> None:
        """Give back all but the connection itself."""


@runtime_checkable
class HashingChannel(Protocol):
    """A Channel that copies bytes itself, and can hash them on the way."""

    def receive_units(self, units: ReadUnits) -> Digests:
        """Return the hashes of units once they are in local memory; nobody is asked for them.

        Raises as `Channel.receive` does.
        """


class Backend(Protocol):
    """One kind; its methods but `listen` run in threads, and may wait within their limits."""

    @property
    def kind(self) -> str:
        """The name of the transport."""

    def listen(self) -> tuple[socket.socket, bytes]:
        """Return a listening socket, and the address for the metadata."""

    def dial(self, address: bytes, timeout: float) -> socket.socket:
        """Connect; raises TransportError or OSError."""

    def open(self, connection: socket.socket, theirs: Metadata) -> Channel:
        """Begin to read, once both sides are authenticated."""

    def serve(self, connection: socket.socket) -> None:
        """Serve an authenticated reader until it goes; raises what went wrong."""


def parts_of(runs: RunTable) -> Iterator[RunTable]:
    """Cut a transfer into parts of MAX_RUNS and MAX_BYTES at most, in order."""
    size = runs.nbytes
    for begin in range(0, size, MAX_BYTES):
        part = runs if size <= MAX_BYTES else runs.between(begin, min(begin + MAX_BYTES, size))
        if len(part) <= MAX_RUNS:
            yield part
        else:
            for first in range(0, len(part), MAX_RUNS):
                yield part[first : first + MAX_RUNS]


def parts_of_units(units: ReadUnits, size: int) -> Iterator[ReadUnits]:
    """Cut a transfer of `size` bytes between units, in order.

    A part has MAX_BYTES at most, or one unit.
    """
    offsets, lengths, ends = units.pieces
    if size <= MAX_BYTES:
        yield units
        return
    done = np.cumsum(lengths)[ends - 1]
    """Bytes up to the end of each unit, which has a piece at least."""
    first = piece = before = 0
    while first < ends.size:
        end = max(int(done.searchsorted(before + MAX_BYTES, "right")), first + 1)
        pieces = slice(piece, int(ends[end - 1]))
        yield replace(
            units,
            labels=units.labels[first:end],
            pieces=Pieces(offsets[pieces], lengths[pieces], ends[first:end] - piece),
            into=units.into[pieces],
        )
        first, piece, before = end, pieces.stop, int(done[end - 1])
