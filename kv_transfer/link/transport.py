"""The transport over links: keeps the peers by owner, lets readers in, leaves bytes to threads."""

import asyncio
import concurrent.futures
import socket
import time
from collections.abc import Sequence

from baton.core.errors import InvalidConfig, PeerLost, TransportError
from baton.core.ids import Incarnation
from baton.kv_transfer.link import auth
from baton.kv_transfer.link.backend import Backend
from baton.kv_transfer.link.reader import CONNECT_S, Counters, Done, Reader
from baton.kv_transfer.link.server import Server
from baton.kv_transfer.link.stream import STALL_S, limit_waits
from baton.kv_transfer.transport import (
    Metadata,
    Peer,
    PeerTable,
    Region,
    Run,
    Transfer,
    TransportStats,
    checked_runs,
)

MAX_QUEUED = 4096
"""Transfers that may wait for one peer; more are refused."""


class LinkTransport:
    """Implements `Transport` over a backend; made by `open_shm` and `open_tcp`."""

    def __init__(
        self, region: Region, backend: Backend, *, owner: str, incarnation: Incarnation,
        secret: bytes,
    ) -> None:  # fmt: skip
        """`secret` is the cluster's, the same for all its instances.

        Raises InvalidConfig if it is too short, OSError if it cannot listen.
        """
        if len(secret) < auth.MIN_SECRET:
            allowed = f"at least {auth.MIN_SECRET} bytes, the same for every instance"
            raise InvalidConfig("handover.secret", f"{len(secret)} bytes", allowed)
        self._region = region
        self._backend = backend
        self._secret = secret
        listener, address = backend.listen()
        self._own = Metadata(owner, incarnation, region.address, region.length, address, b"")
        self._server = Server(listener, self._serve)
        self._peers = PeerTable()
        self._readers: dict[Peer, Reader] = {}
        self._counters = Counters()
        self._posted = 0
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._peers)} peers"
        return f"<{self.name} transport of {self._own.owner}, {self._region.length} bytes, {state}>"

    @property
    def name(self) -> str:
        """The backend's kind: `shm` or `tcp`."""
        return self._backend.kind

    def metadata(self) -> bytes:
        """See Transport."""
        return self._own.pack(self.name)

    async def add_peer(self, metadata: bytes) -> Peer:
        """See Transport. Also raises TransportError if the peer does not know the secret."""
        self._ensure_open()
        theirs = Metadata.unpack(metadata, self.name)
        peer = self._peers.find(metadata, theirs)
        if peer is None or not self._readers[peer].usable:
            peer, old = self._peers.add(metadata, theirs)
            fenced = None if old is None else self._disconnect(old)
            self._readers[peer] = Reader(peer, theirs, self._backend, self._prove, self._counters)
            if fenced is not None:
                await outcome(fenced)
        reader = self._readers.get(peer)
        try:
            if reader is None:
                raise TransportError(f"{peer} was removed while it was added")
            await outcome(reader.connected)
        except TransportError:
            await self.remove_peer(peer)
            raise
        return peer

    def read(self, peer: Peer, runs: Sequence[Run]) -> Transfer:
        """See Transport."""
        self._ensure_open()
        wanted = checked_runs(runs, self._region.length, peer.length)
        reader = self._readers.get(peer)
        if reader is not None and reader.waiting >= MAX_QUEUED:
            raise TransportError(f"{MAX_QUEUED} transfers from {peer} wait already")
        transfer = Transfer(peer, sum(run.length for run in wanted))
        if not wanted:
            transfer.finish("none")
            return transfer
        self._posted += 1
        if reader is None:
            self._counters.ended(transfer, "none", PeerLost(f"{peer} was removed"))
        else:
            reader.post(transfer, wanted)
        return transfer

    async def remove_peer(self, peer: Peer) -> None:
        """See Transport."""
        self._peers.discard(peer)
        await outcome(self._disconnect(peer))

    async def close(self) -> None:
        """See Transport."""
        self._closed = True
        self._peers.clear()
        fences = [self._disconnect(peer) for peer in list(self._readers)]
        for fence in fences:
            await outcome(fence)
        await asyncio.to_thread(self._server.stop)

    def check(self) -> None:
        """See Transport."""
        stats = self.stats()
        assert stats.transfers_open == 0, stats
        assert stats.peers == 0, self._peers
        assert not self._readers, "a peer that was removed is not fenced yet"

    def stats(self) -> TransportStats:
        """See Transport."""
        counters = self._counters
        with counters.lock:
            return TransportStats(
                bytes_read=dict(counters.bytes_read),
                transfers_open=self._posted - counters.done - counters.failed,
                transfers_done=counters.done,
                transfers_failed=counters.failed,
                peers=len(self._peers),
            )

    def _ensure_open(self) -> None:
        if self._closed:
            raise TransportError("the transport is closed")

    def _disconnect(self, peer: Peer) -> Done:
        reader = self._readers.pop(peer, None)
        if reader is None:
            return _NOTHING
        reader.stop()
        return reader.ended

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


_NOTHING: Done = concurrent.futures.Future()
_NOTHING.set_result(None)


async def outcome(done: Done) -> None:
    """Wait for a thread; cancelling the wait leaves what the thread does as it is."""
    await asyncio.shield(asyncio.wrap_future(done))
