"""The transport over links: lets readers in, and leaves bytes to a thread for each peer."""

import asyncio
import socket
import time

from baton.core.errors import InvalidConfig, PeerLost, TransportError
from baton.core.ids import Incarnation
from baton.kv_transfer.base import NOTHING_TO_DO, BaseTransport, Done, outcome
from baton.kv_transfer.grants import Grants
from baton.kv_transfer.link import auth
from baton.kv_transfer.link.backend import Backend
from baton.kv_transfer.link.reader import CONNECT_S, Reader
from baton.kv_transfer.link.server import Server
from baton.kv_transfer.link.stream import STALL_S, limit_waits
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import (
    Metadata,
    Peer,
    Region,
    Transfer,
    UnitsOf,
)

MAX_QUEUED = 4096
"""Transfers that may wait for one peer; more are refused."""


class LinkTransport(BaseTransport):
    """Implements `Transport` over a backend, whose kind, `shm` or `tcp`, is its name."""

    def __init__(
        self, region: Region, backend: Backend, *, owner: str, incarnation: Incarnation,
        secret: bytes, grants: Grants | None = None,
    ) -> None:  # fmt: skip
        """`secret` is the cluster's, the same for all its instances; `grants` are the backend's.

        Raises InvalidConfig if it is too short, OSError if it cannot listen.
        """
        if len(secret) < auth.MIN_SECRET:
            allowed = f"at least {auth.MIN_SECRET} bytes, the same for every instance"
            raise InvalidConfig("handover.secret", f"{len(secret)} bytes", allowed)
        listener, address = backend.listen()
        own = Metadata(owner, incarnation, region.address, region.length, address, b"")
        super().__init__(backend.kind, region, own, grants=grants)
        self._backend = backend
        self._secret = secret
        self._readers: dict[Peer, Reader] = {}
        self._server = Server(listener, self._serve)

    def check(self) -> None:
        """See Transport."""
        super().check()
        assert not self._readers, "a peer that was removed is not fenced yet"

    def _connect(self, peer: Peer, theirs: Metadata) -> Done:
        """Fails with TransportError also if the peer does not know the secret."""
        reader = Reader(peer, theirs, self._backend, self._prove, self._counters)
        self._readers[peer] = reader
        return reader.connected

    def _disconnect(self, peer: Peer) -> Done:
        reader = self._readers.pop(peer, None)
        if reader is None:
            return NOTHING_TO_DO
        reader.stop()
        return reader.ended

    def _usable(self, peer: Peer) -> bool:
        return self._readers[peer].usable

    def _post(self, transfer: Transfer, runs: RunTable, units: UnitsOf | None) -> None:
        reader = self._readers.get(transfer.peer)
        if reader is None:
            self._counters.ended(transfer, "none", PeerLost(f"{transfer.peer} was removed"))
            return
        if reader.waiting >= MAX_QUEUED:
            raise TransportError(f"{MAX_QUEUED} transfers from {transfer.peer} wait already")
        reader.post(transfer, runs, units)

    async def _shut(self) -> None:
        fences = [self._disconnect(peer) for peer in list(self._readers)]
        for fence in fences:
            await outcome(fence)
        await asyncio.to_thread(self._server.stop)

    # In threads.

    def _prove(self, connection: socket.socket, theirs: Metadata, deadline: float) -> None:
        own = self._own
        parties = auth.Parties(own.owner, own.incarnation, theirs.owner, theirs.incarnation)
        auth.prove_as_reader(connection, self._secret, self.name, parties, deadline)

    def _serve(self, connection: socket.socket) -> None:
        own = (self._own.owner, self._own.incarnation)
        deadline = time.monotonic() + CONNECT_S
        auth.prove_as_owner(connection, self._secret, self.name, own, deadline)
        limit_waits(connection, STALL_S)
        self._backend.serve(connection)
