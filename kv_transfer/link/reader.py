"""The connection to one peer and the thread that reads by it.

States: connecting → open → ended (lost, refused or stopped), with every transfer completed. Ended
is the fence: the thread is gone, and no other writes what it read.
"""

import concurrent.futures
import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from baton.core.errors import PeerLost, TransportError
from baton.kernels.kv_digest import Digests
from baton.kv_transfer.base import Counters, Done
from baton.kv_transfer.link.backend import (
    Backend,
    Channel,
    HashingChannel,
    ReadRefused,
    parts_of,
    parts_of_units,
)
from baton.kv_transfer.link.stream import STALL_S, limit_waits, wake
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import Metadata, Peer, ReadUnits, Transfer, UnitsOf

CONNECT_S = 5.0
"""To connect, and then again to prove who one is."""
PARTS_AHEAD = 4
"""Parts asked for before the oldest has arrived: the link never idles while the next request
travels, and their requests (32 KiB) fit into the peer's socket, so that nobody waits in a ring."""

Authenticate = Callable[[socket.socket, Metadata, float], None]


@dataclass(eq=False, slots=True)
class _Job:
    transfer: Transfer
    runs: RunTable
    units: UnitsOf | None
    to_ask: "deque[RunTable | ReadUnits]" = field(default_factory=deque)
    to_receive: int = 0
    """Parts that have not arrived; 0 until they are cut."""
    hashes: list[Digests] = field(default_factory=list)
    refused: TransportError | None = None

    def cut(self, *, hashes: bool) -> None:
        """Cut it into parts: of units, if the channel hashes and they are wanted."""
        if self.units is not None and hashes:
            self.to_ask.extend(parts_of_units(self.units(), self.transfer.size))
        else:
            self.to_ask.extend(parts_of(self.runs))
        self.to_receive = len(self.to_ask)

    def all_hashes(self) -> Digests | None:
        """Return what was hashed on the way."""
        if len(self.hashes) < 2:
            return self.hashes[0] if self.hashes else None
        return np.concatenate(self.hashes)


_Asked = tuple[_Job, RunTable | ReadUnits]


class Reader:
    """Public methods are for the event loop; what begins with an underscore runs in the thread."""

    def __init__(
        self, peer: Peer, theirs: Metadata, backend: Backend, authenticate: Authenticate,
        counters: Counters,
    ) -> None:  # fmt: skip
        self.connected: Done = concurrent.futures.Future()
        self.ended: Done = concurrent.futures.Future()
        self._peer = peer
        self._theirs = theirs
        self._backend = backend
        self._authenticate = authenticate
        self._counters = counters
        self._lock = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._connection: socket.socket | None = None
        self._why: TransportError | None = None
        """Why no more is read; set once, under the lock."""
        self._thread = threading.Thread(target=self._main, name="baton-kv-read", daemon=True)
        self._thread.start()

    @property
    def usable(self) -> bool:
        """False once the connection is lost or stopped, as far as is known."""
        return self._why is None

    @property
    def waiting(self) -> int:
        """Transfers that wait for the thread."""
        return len(self._jobs)

    def post(self, transfer: Transfer, runs: RunTable, units: UnitsOf | None) -> None:
        """Start a transfer of at least one run."""
        with self._lock:
            if self._why is None:
                self._jobs.append(_Job(transfer, runs, units))
                self._lock.notify()
                return
        self._counters.ended(transfer, "none", PeerLost(str(self._why)))

    def stop(self) -> None:
        """Have every transfer complete, as lost unless it is through; then `ended` is set."""
        self._end(PeerLost(f"{self._peer} was removed"))

    # In the thread.

    def _main(self) -> None:
        carrier = "none"
        under_way: deque[_Asked] = deque()
        try:
            with contextlib.closing(self._connect()) as channel:
                carrier = channel.carrier
                self.connected.set_result(None)
                self._loop(channel, under_way)
        except TransportError as error:
            self._end(type(error)(f"{self._peer}: {error}"))
        except OSError as error:
            self._end(PeerLost(f"{self._peer}: {error.strerror or error}"))
        finally:
            # Also after an error of ours: nobody may wait for a thread that has died.
            self._end(TransportError(f"the thread that reads from {self._peer} failed"))
            self._finish(carrier, [job for job, _ in under_way])

    def _connect(self) -> Channel:
        connection = self._backend.dial(self._theirs.address, CONNECT_S)
        with self._lock:
            self._connection = connection
            if self._why is not None:
                raise self._why
        self._authenticate(connection, self._theirs, time.monotonic() + CONNECT_S)
        limit_waits(connection, STALL_S)
        return self._backend.open(connection, self._theirs)

    def _loop(self, channel: Channel, under_way: "deque[_Asked]") -> None:
        hashing = channel if isinstance(channel, HashingChannel) else None
        while True:
            while len(under_way) < PARTS_AHEAD:
                asked = self._next(wait=not under_way, hashes=hashing is not None)
                if asked is None:
                    break
                under_way.append(asked)
                if isinstance(asked[1], RunTable):
                    channel.ask(asked[1], asked[0].transfer.ticket)
            job, part = under_way[0]
            if isinstance(part, RunTable):
                self._receive(channel, job, part)
            else:
                assert hashing is not None, "cut for another channel"
                job.hashes.append(hashing.receive_units(part))
            under_way.popleft()
            job.to_receive -= 1
            if not job.to_receive:
                self._counters.ended(job.transfer, channel.carrier, job.refused, job.all_hashes())

    def _receive(self, channel: Channel, job: _Job, part: RunTable) -> None:
        """Receive a part; if it is refused, that ends its job, and nobody else's."""
        try:
            channel.receive(part)
        except ReadRefused as error:
            job.refused = TransportError(f"{self._peer}: {error}")

    def _next(self, *, wait: bool, hashes: bool) -> "_Asked | None":
        """Return the next part to ask for and whose it is; None if there is none and not `wait`."""
        with self._lock:
            while wait and not self._jobs and self._why is None:
                self._lock.wait()
            if self._why is not None:
                raise self._why
            if not self._jobs:
                return None
            job = self._jobs[0]  # stays there meanwhile: nobody else takes it
        if not job.to_receive:
            job.cut(hashes=hashes)  # takes a while, if it makes labels
        part = job.to_ask.popleft()
        if not job.to_ask:
            with self._lock:
                self._jobs.popleft()
        return job, part

    def _end(self, why: TransportError) -> None:
        """Let nothing more begin; the first reason counts."""
        with self._lock:
            if self._why is None:
                self._why = why
            self._lock.notify()
            if self._connection is not None:
                wake(self._connection)

    def _finish(self, carrier: str, under_way: list[_Job]) -> None:
        """Complete what is left; from now on nothing of this peer is written."""
        assert self._why is not None
        if self._connection is not None:
            self._connection.close()
        if not self.connected.done():
            self.connected.set_exception(self._why)
        left = dict.fromkeys((*under_way, *self._jobs))  # the head of the queue may be in both
        self._jobs.clear()
        for job in left:
            self._counters.ended(job.transfer, carrier, type(self._why)(str(self._why)))
        self.ended.set_result(None)
