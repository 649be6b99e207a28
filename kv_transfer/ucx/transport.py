"""The transport over UCX: leaves all that UCX does to its thread."""

import asyncio

from baton.core.ids import Incarnation
from baton.kv_transfer.base import BaseTransport, Counters, Done
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import Metadata, Peer, Region, Transfer, UnitsOf
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.worker import UcxWorker

_KIND = "ucx"


class UcxTransport(BaseTransport):
    """Implements `Transport`; made by `open`.

    To close it takes five seconds at most; what UCX has not ended then is left as it is.
    """

    def __init__(
        self, worker: UcxWorker, counters: Counters, region: Region, own: Metadata
    ) -> None:
        super().__init__(_KIND, region, own, counters)
        self._worker = worker

    @classmethod
    async def open(
        cls, region: Region, *, owner: str, incarnation: Incarnation, config: UcxConfig
    ) -> "UcxTransport":
        """Start UCX and register `region`.

        `owner` names this process among all others, the same after a restart.

        Raises TransportError if UCX is missing, refuses a setting or cannot register the region.
        """
        counters = Counters()
        worker = UcxWorker(region, config, counters)
        try:
            await worker.start()
        except asyncio.CancelledError:
            worker.request_stop()
            raise
        base, length = region.address, region.length
        own = Metadata(owner, incarnation, base, length, worker.address, worker.key)
        return cls(worker, counters, region, own)

    def check(self) -> None:
        """See Transport."""
        super().check()
        assert self._worker.endpoints == 0, "a peer that was removed is not fenced yet"

    def _connect(self, peer: Peer, theirs: Metadata) -> Done:
        return self._worker.connect(peer, theirs)

    def _disconnect(self, peer: Peer) -> Done:
        return self._worker.disconnect(peer)

    def _usable(self, peer: Peer) -> bool:
        return not self._connected[peer].done() or self._worker.usable(peer)

    def _post(self, transfer: Transfer, runs: RunTable, units: UnitsOf | None) -> None:
        self._worker.post(transfer, runs)

    async def _shut(self) -> None:
        await self._worker.stop()
