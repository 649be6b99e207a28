"""gRPC channels to other instances, closed when idle and the instance has restarted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from baton.core.config import ClusterTlsConfig
from baton.core.ids import Incarnation, InstanceId
from baton.proto.grpc_runtime import open_channel


@dataclass(frozen=True, slots=True)
class PeerRef:
    """An instance that the router chose, to hand over or to back up to."""

    instance_id: InstanceId
    address: str
    incarnation: Incarnation


@dataclass(slots=True)
class _Entry:
    channel: grpc.aio.Channel
    users: int = 0


class PeerChannels:
    """One channel per incarnation that is in use, and one per instance for the one asked for last.

    Gateways learn of a restart one after the other, so for a while both incarnations are asked
    for. Neither may then end what the other has under way.
    """

    def __init__(self, tls: ClusterTlsConfig | None = None) -> None:
        self._tls = tls
        self._open: dict[PeerRef, _Entry] = {}
        self._latest: dict[InstanceId, PeerRef] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def channel(self, ref: PeerRef) -> AsyncIterator[grpc.aio.Channel]:
        """Lend the channel to this incarnation of the instance; it stays open meanwhile."""
        before = self._latest.get(ref.instance_id)
        self._latest[ref.instance_id] = ref
        entry = self._open.get(ref)
        if entry is None:
            entry = self._open[ref] = _Entry(open_channel(ref.address, self._tls))
        entry.users += 1
        if before is not None:
            self._drop_if_unwanted(before)
        try:
            yield entry.channel
        finally:
            entry.users -= 1
            self._drop_if_unwanted(ref)

    def _drop_if_unwanted(self, ref: PeerRef) -> None:
        entry = self._open.get(ref)
        if entry is not None and not entry.users and self._latest[ref.instance_id] != ref:
            self._drop(ref)

    def _drop(self, ref: PeerRef) -> None:
        task = asyncio.create_task(self._open.pop(ref).channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all channels; calls still open on them are cancelled."""
        for ref in list(self._open):
            self._drop(ref)
        await asyncio.gather(*self._closing)
