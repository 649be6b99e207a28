"""What the transports share: one connection to each peer, fenced before another replaces it."""

import asyncio
import concurrent.futures
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from baton.core.errors import TransportError
from baton.core.ids import NO_TICKET, Ticket
from baton.kernels.kv_digest import Digests
from baton.kernels.native.kv_digest import Ints
from baton.kv_transfer.grants import Grants
from baton.kv_transfer.runs import RunTable, checked_runs
from baton.kv_transfer.transport import (
    Metadata,
    Peer,
    PeerTable,
    Region,
    Run,
    Transfer,
    TransportStats,
    UnitsOf,
)

Done = concurrent.futures.Future[None]
"""Something that a thread does; the result may be a TransportError."""

NOTHING_TO_DO: Done = concurrent.futures.Future()
NOTHING_TO_DO.set_result(None)


@dataclass
class Counters:
    """What became of the transfers of a transport."""

    posted: int = 0
    """Counted in the event loop, after the transfer was taken."""
    done: int = 0
    failed: int = 0
    bytes_read: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ended(
        self,
        transfer: Transfer,
        carrier: str,
        error: TransportError | None,
        hashes: Digests | None = None,
    ) -> None:
        """Count a transfer and complete it; from any thread."""
        with self.lock:
            if error is None:
                self.done += 1
                self.bytes_read[carrier] += transfer.size
            else:
                self.failed += 1
        transfer.finish(carrier, error, hashes)

    def stats(self, peers: int) -> TransportStats:
        """Return them as they are now."""
        with self.lock:
            return TransportStats(
                bytes_read=dict(self.bytes_read),
                transfers_open=self.posted - self.done - self.failed,
                transfers_done=self.done,
                transfers_failed=self.failed,
                peers=peers,
            )


class BaseTransport(ABC):
    """Implements `Transport` but for the connections, whose `_` methods a subclass brings."""

    def __init__(
        self,
        kind: str,
        region: Region,
        own: Metadata,
        counters: Counters | None = None,
        *,
        grants: Grants | None = None,
    ) -> None:
        """`grants` are of who serves every read itself, and asks them."""
        self._kind = kind
        self._region = region
        self._own = own
        self._peers = PeerTable()
        self._connected: dict[Peer, Done] = {}
        self._counters = counters or Counters()
        self._grants = grants
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._peers)} peers"
        return f"<{self.name} transport of {self._own.owner}, {self._region.length} bytes, {state}>"

    @property
    def name(self) -> str:
        """See Transport."""
        return self._kind

    def metadata(self) -> bytes:
        """See Transport."""
        return self._own.pack(self.name)

    async def add_peer(self, metadata: bytes) -> Peer:
        """See Transport."""
        self._ensure_open()
        theirs = Metadata.unpack(metadata, self.name)
        peer = self._peers.find(metadata, theirs)
        if peer is None or not self._usable(peer):
            peer, old = self._peers.add(metadata, theirs)
            # Both begin without a pause, so that a removal comes after them.
            fenced = NOTHING_TO_DO if old is None else self._leave(old)
            self._connected[peer] = self._connect(peer, theirs)
            await outcome(fenced)
        connected = self._connected.get(peer)
        try:
            if connected is None:
                raise TransportError(f"{peer} was removed while it was added")
            await outcome(connected)
        except TransportError:
            await self.remove_peer(peer)
            raise
        return peer

    def grant(self, ticket: Ticket, offsets: Ints, lengths: Ints) -> None:
        """See Transport."""
        if self._grants is not None:
            self._grants.grant(ticket, offsets, lengths)

    def revoke(self, ticket: Ticket) -> None:
        """See Transport."""
        if self._grants is not None:
            self._grants.revoke(ticket)

    def read(
        self,
        peer: Peer,
        runs: Sequence[Run],
        units: UnitsOf | None = None,
        ticket: Ticket = NO_TICKET,
    ) -> Transfer:
        """See Transport."""
        self._ensure_open()
        wanted = checked_runs(runs, self._region.length, peer.length)
        transfer = Transfer(peer, wanted.nbytes, ticket)
        if len(wanted):
            self._post(transfer, wanted, units)
            self._counters.posted += 1
        else:
            transfer.finish("none")
        return transfer

    async def remove_peer(self, peer: Peer) -> None:
        """See Transport."""
        self._peers.discard(peer)
        await outcome(self._leave(peer))

    async def close(self) -> None:
        """See Transport."""
        self._closed = True
        self._peers.clear()
        self._connected.clear()
        await self._shut()

    def check(self) -> None:
        """See Transport."""
        stats = self.stats()
        assert stats.transfers_open == 0, stats
        assert stats.peers == 0, self._peers
        assert not self._connected, "a peer that was removed is still connected"
        assert self._grants is None or not self._grants.tickets, self._grants

    def stats(self) -> TransportStats:
        """See Transport."""
        stats = self._counters.stats(len(self._peers))
        if self._grants is None:
            return stats
        return replace(stats, refused=self._grants.refused, tickets_open=self._grants.tickets)

    def _ensure_open(self) -> None:
        if self._closed:
            raise TransportError("the transport is closed")

    def _leave(self, peer: Peer) -> Done:
        self._connected.pop(peer, None)
        return self._disconnect(peer)

    @abstractmethod
    def _connect(self, peer: Peer, theirs: Metadata) -> Done:
        """Begin to connect to `peer`."""

    @abstractmethod
    def _disconnect(self, peer: Peer) -> Done:
        """Begin to close; done, without an error, when all transfers of `peer` have completed."""

    @abstractmethod
    def _usable(self, peer: Peer) -> bool:
        """Return False once the connection to `peer`, which was begun, is lost."""

    @abstractmethod
    def _post(self, transfer: Transfer, runs: RunTable, units: UnitsOf | None) -> None:
        """Start `transfer` of one run or more; raises TransportError if too much is waiting."""

    @abstractmethod
    async def _shut(self) -> None:
        """Close all connections; return when nothing is under way. Safe to repeat."""


async def outcome(done: Done) -> None:
    """Wait for a thread; cancelling the wait leaves what the thread does as it is."""
    if done.done():
        done.result()
    else:
        await asyncio.shield(asyncio.wrap_future(done))
