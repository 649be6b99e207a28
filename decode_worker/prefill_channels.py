"""One gRPC channel per prefill instance, dropped when the instance has restarted."""

import asyncio
from dataclasses import dataclass

import grpc

from baton.core.ids import Incarnation, InstanceId
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.grpc_runtime import open_channel


@dataclass(frozen=True, slots=True)
class PrefillRef:
    """A prefill instance that the router chose."""

    instance_id: InstanceId
    address: str
    incarnation: Incarnation


class PrefillChannels:
    """Channels by instance; at most one per instance, so at most as many as instances seen."""

    def __init__(self) -> None:
        self._open: dict[InstanceId, tuple[PrefillRef, grpc.aio.Channel]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def stub(self, ref: PrefillRef) -> pb_grpc.PrefillStub:
        """Return a stub for this incarnation of the instance."""
        known = self._open.get(ref.instance_id)
        if known is None or known[0] != ref:
            if known is not None:
                self._drop(known[1])
            self._open[ref.instance_id] = known = (ref, open_channel(ref.address))
        return pb_grpc.PrefillStub(known[1])

    def _drop(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.create_task(channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all channels; calls still open on them are cancelled."""
        for _, channel in self._open.values():
            self._drop(channel)
        self._open.clear()
        await asyncio.gather(*self._closing)
