"""The transport over UCX: keeps the peers by owner, and leaves all that UCX does to its thread."""

import asyncio
from collections.abc import Sequence

from baton.core.errors import TransportError
from baton.core.ids import Incarnation
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
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.worker import Done, UcxWorker, outcome

_KIND = "ucx"


class UcxTransport:
    """Implements `Transport`; made by `open`."""

    def __init__(self, worker: UcxWorker, region: Region, own: Metadata) -> None:
        self._worker = worker
        self._region = region
        self._own = own
        self._peers = PeerTable()
        self._connected: dict[Peer, Done] = {}
        self._closed = False

    @classmethod
    async def open(
        cls, region: Region, *, owner: str, incarnation: Incarnation, config: UcxConfig
    ) -> "UcxTransport":
        """Start UCX and register `region`.

        `owner` names this process among all others, the same after a restart.

        Raises TransportError if UCX is missing, refuses a setting or cannot register the region.
        """
        worker = UcxWorker(region, config)
        try:
            await worker.start()
        except asyncio.CancelledError:
            worker.request_stop()
            raise
        base, length = region.address, region.length
        own = Metadata(owner, incarnation, base, length, worker.address, worker.key)
        return cls(worker, region, own)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._peers)} peers"
        return f"<UcxTransport of {self._own.owner}, {self._region.length} bytes, {state}>"

    @property
    def name(self) -> str:
        """`ucx`."""
        return _KIND

    def metadata(self) -> bytes:
        """See Transport."""
        return self._own.pack(_KIND)

    async def add_peer(self, metadata: bytes) -> Peer:
        """See Transport."""
        self._ensure_open()
        theirs = Metadata.unpack(metadata, _KIND)
        peer = self._peers.find(metadata, theirs)
        if peer is None or not self._alive(peer):
            peer, old = self._peers.add(metadata, theirs)
            # Both go to the thread without a pause, so that a removal comes after them.
            fenced = None if old is None else self._disconnect(old)
            connected = self._connected[peer] = self._worker.connect(peer, theirs)
            if fenced is not None:
                await outcome(fenced)
        else:
            connected = self._connected[peer]
        try:
            await outcome(connected)
        except TransportError:
            await self.remove_peer(peer)
            raise
        return peer

    def read(self, peer: Peer, runs: Sequence[Run]) -> Transfer:
        """See Transport."""
        self._ensure_open()
        wanted = checked_runs(runs, self._region.length, peer.length)
        transfer = Transfer(peer, sum(run.length for run in wanted))
        if wanted:
            self._worker.post(transfer, wanted)
        else:
            transfer.finish("none")
        return transfer

    async def remove_peer(self, peer: Peer) -> None:
        """See Transport."""
        self._peers.discard(peer)
        await outcome(self._disconnect(peer))

    async def close(self) -> None:
        """See Transport. After five seconds UCX is left as it is, with the region."""
        self._closed = True
        self._peers.clear()
        self._connected.clear()
        await self._worker.stop()

    def check(self) -> None:
        """See Transport."""
        stats = self.stats()
        assert stats.transfers_open == 0, stats
        assert stats.peers == 0, self._peers
        assert self._worker.endpoints == 0, "a peer that was removed is not fenced yet"

    def stats(self) -> TransportStats:
        """See Transport."""
        counters = self._worker.counters
        return TransportStats(
            bytes_read=dict(counters.bytes_read),
            transfers_open=self._worker.posted - counters.done - counters.failed,
            transfers_done=counters.done,
            transfers_failed=counters.failed,
            peers=len(self._peers),
        )

    def _ensure_open(self) -> None:
        if self._closed:
            raise TransportError("the transport is closed")

    def _alive(self, peer: Peer) -> bool:
        return not self._connected[peer].done() or self._worker.usable(peer)

    def _disconnect(self, peer: Peer) -> Done:
        self._connected.pop(peer, None)
        return self._worker.disconnect(peer)
