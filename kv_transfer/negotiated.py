"""Several transports as one: a pair of processes uses the first that both have and that works.

The metadata lists all that the owner of the memory offers. The reader tries them in its own order
of preference; taking another than its first is a fallback: logged with the reason, and counted.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from baton.core.errors import PeerLost, TransportError
from baton.core.ids import NO_TICKET, Incarnation, Ticket
from baton.core.log import get_logger
from baton.kernels.native.kv_digest import Ints
from baton.kv_transfer.link.local import host_id
from baton.kv_transfer.runs import checked_runs
from baton.kv_transfer.transport import (
    Metadata,
    Peer,
    PeerTable,
    Region,
    Run,
    Transfer,
    TransferReport,
    Transport,
    TransportStats,
    UnitsOf,
)

_KIND = "negotiated"
_ONE_HOST = {"shm", "cuda_ipc"}
"""Kinds that do not reach another host, and that nobody misses there."""

_log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Way:
    """How one peer is reached."""

    transport: Transport
    peer: Peer
    """In the words of `transport`."""
    proved: bool = False
    """A read has succeeded. Not every library says when it connects that the peer is reached."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a peer's metadata says."""

    metadata: Metadata
    same_host: bool
    by_kind: dict[str, bytes]


class NegotiatedTransport:
    """Implements `Transport` over others, which it owns; the first is preferred."""

    def __init__(
        self, transports: Sequence[Transport], region: Region, *, owner: str,
        incarnation: Incarnation,
    ) -> None:  # fmt: skip
        assert transports, "one transport at least"
        self._transports = tuple(transports)
        self._region = region
        offers = msgpack.packb([(one.name, one.metadata()) for one in transports])
        host = host_id().encode()
        self._own = Metadata(owner, incarnation, region.address, region.length, host, offers)
        self._peers = PeerTable()
        self._ways: dict[Peer, _Way] = {}
        self._unfit: dict[tuple[str, int, str], str] = {}
        """By (owner, incarnation, kind): why others are tried first, as the first reads showed."""
        self._adding: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._refused = 0
        self._fallbacks = 0
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._peers)} peers"
        kinds = ", ".join(one.name for one in self._transports)
        return f"<transport of {self._own.owner} over {kinds}, {state}>"

    @property
    def name(self) -> str:
        """`negotiated`."""
        return _KIND

    @property
    def ways(self) -> tuple[str, ...]:
        """Name what it reads by, so that two with a name in common can probably read each other."""
        here = host_id()
        kinds = [one.name for one in self._transports]
        return tuple(f"{kind} {here}" if kind in _ONE_HOST else kind for kind in kinds)

    def metadata(self) -> bytes:
        """See Transport. Without a secret: it may be shown to anybody."""
        return self._own.pack(_KIND)

    async def add_peer(self, metadata: bytes) -> Peer:
        """See Transport. Raises TransportError with every reason if no transport works."""
        self._ensure_open()
        offer = self._unpack(metadata)
        async with self._adding[offer.metadata.owner]:
            self._ensure_open()
            peer = self._peers.find(metadata, offer.metadata)
            if peer is None:
                peer, old = self._peers.add(metadata, offer.metadata)
                if old is not None:
                    await self._fence(old)
            known = self._ways.get(peer)
            try:
                way = await self._reach(offer)
            except TransportError:
                await self.remove_peer(peer)
                raise
            if known is None:
                self._ways[peer] = way
            elif (known.transport, known.peer) != (way.transport, way.peer):
                # The connection was lost; who still has the old peer must notice.
                lost = peer
                peer, _ = self._peers.add(metadata, offer.metadata)
                self._ways[peer] = way
                await self._fence(lost)
        return peer

    def grant(self, ticket: Ticket, offsets: Ints, lengths: Ints) -> None:
        """See Transport."""
        for one in self._transports:
            one.grant(ticket, offsets, lengths)

    def revoke(self, ticket: Ticket) -> None:
        """See Transport."""
        for one in self._transports:
            one.revoke(ticket)

    def read(
        self,
        peer: Peer,
        runs: Sequence[Run],
        units: UnitsOf | None = None,
        ticket: Ticket = NO_TICKET,
    ) -> Transfer:
        """See Transport."""
        self._ensure_open()
        way = self._ways.get(peer)
        if way is not None:
            transfer = way.transport.read(way.peer, runs, units, ticket)
            if not way.proved:
                transfer.then(lambda outcome: self._ended(peer, way, outcome))
            return transfer
        transfer = Transfer(peer, checked_runs(runs, self._region.length, peer.length).nbytes)
        self._refused += 1
        transfer.finish("none", PeerLost(f"{peer} was removed"))
        return transfer

    async def remove_peer(self, peer: Peer) -> None:
        """See Transport."""
        self._peers.discard(peer)
        await self._fence(peer)

    async def close(self) -> None:
        """See Transport."""
        self._closed = True
        self._peers.clear()
        self._ways.clear()
        await asyncio.gather(*(one.close() for one in self._transports))

    def check(self) -> None:
        """See Transport."""
        assert not len(self._peers), self._peers
        assert not self._ways, "a peer that was removed still has a way"
        for one in self._transports:
            one.check()

    def stats(self) -> TransportStats:
        """See Transport."""
        every = [one.stats() for one in self._transports]
        bytes_read: dict[str, int] = {}
        for stats in every:
            for carrier, count in stats.bytes_read.items():
                bytes_read[carrier] = bytes_read.get(carrier, 0) + count
        return TransportStats(
            bytes_read=bytes_read,
            transfers_open=sum(stats.transfers_open for stats in every),
            transfers_done=sum(stats.transfers_done for stats in every),
            transfers_failed=sum(stats.transfers_failed for stats in every) + self._refused,
            peers=len(self._peers),
            fallbacks=self._fallbacks,
            refused=sum(stats.refused for stats in every),
            tickets_open=sum(stats.tickets_open for stats in every),
        )

    def _ensure_open(self) -> None:
        if self._closed:
            raise TransportError("the transport is closed")

    def _unpack(self, packed: bytes) -> _Offer:
        metadata = Metadata.unpack(packed, _KIND)
        try:
            by_kind = dict(msgpack.unpackb(metadata.key))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise TransportError("the list of offered transports is damaged") from error
        return _Offer(metadata, metadata.address == self._own.address, by_kind)

    async def _reach(self, offer: _Offer) -> _Way:
        """Return the best way that works; kinds that have failed this incarnation come last."""
        theirs = offer.metadata
        reasons: list[str] = []

        def failed_before(transport: Transport) -> bool:
            return (theirs.owner, theirs.incarnation, transport.name) in self._unfit

        possible = [t for t in self._transports if offer.same_host or t.name not in _ONE_HOST]
        for transport in sorted(possible, key=failed_before):
            packed = offer.by_kind.get(transport.name)
            if packed is None:
                reasons.append(f"{transport.name}: the peer does not offer it")
                continue
            try:
                peer = await transport.add_peer(packed)
            except TransportError as error:
                reasons.append(f"{transport.name}: {error}")
                continue
            if transport is not (first := possible[0]):
                why = self._unfit.get((theirs.owner, theirs.incarnation, first.name))
                self._fell_back(theirs.owner, transport.name, reasons or [f"{first.name}: {why}"])
            return _Way(transport, peer)
        raise TransportError(f"no transport reaches {theirs.owner}; " + "; ".join(reasons))

    def _ended(self, peer: Peer, way: _Way, outcome: TransferReport | TransportError) -> None:
        """Look at the first reads by `way`: only they show what the library really does."""
        if way.proved or self._ways.get(peer) is not way:
            return
        kind = way.transport.name
        key = (peer.owner, peer.incarnation, kind)
        if isinstance(outcome, PeerLost):
            self._unfit[key] = "reads by it failed"
        elif isinstance(outcome, TransferReport):
            way.proved = True
            if kind == "ucx" and "tcp" in outcome.transport.split("+"):
                # From the next `add_peer` on this peer is read by another kind, if there is one.
                self._unfit[key] = "it has nothing better than TCP"
                reason = "UCX has nothing better to this peer"
                self._fell_back(peer.owner, f"ucx over {outcome.transport}", [reason])

    def _fell_back(self, owner: str, to: str, reasons: Sequence[str]) -> None:
        self._fallbacks += 1
        _log.warning("transport.fallback", peer=owner, to=to, reason="; ".join(reasons))

    async def _fence(self, peer: Peer) -> None:
        way = self._ways.pop(peer, None)
        if way is not None:
            await way.transport.remove_peer(way.peer)
