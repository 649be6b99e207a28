"""The Lease service of an instance's leader: beats in, reports out."""

from collections.abc import AsyncIterator
from typing import Protocol

import grpc

from baton.core.errors import BatonError, StaleReference
from baton.core.ids import Incarnation
from baton.core.lease import Beat, Leave, Report
from baton.proto import lease_pb2 as pb
from baton.proto import lease_pb2_grpc as pb_grpc
from baton.proto.convert_lease import beat_core, report_proto
from baton.proto.errors import to_status


class LeaseHolder(Protocol):
    """The instance."""

    incarnation: Incarnation

    def beat(self, beat: Beat) -> Report:
        """Take a grant, and say how the instance is."""
        ...

    def left(self, last: Beat, leave: Leave) -> None:
        """Hear how a granter goes."""
        ...


def add_lease_service(server: grpc.aio.Server, holder: LeaseHolder) -> None:
    """Let a server answer beats."""
    pb_grpc.add_LeaseServicer_to_server(LeaseService(holder), server)


class LeaseService(pb_grpc.LeaseServicer):
    """Serves every granter on a stream of its own; one that breaks says nothing."""

    def __init__(self, holder: LeaseHolder) -> None:
        self._holder = holder

    async def Hold(  # noqa: N802  (the name in the .proto file)
        self,
        request_iterator: AsyncIterator[pb.Beat],
        context: "grpc.aio.ServicerContext[pb.Beat, pb.Report]",
    ) -> None:
        """Answer each beat; see proto/lease.proto."""
        try:
            async for message in request_iterator:
                self._expect_meant(message.incarnation)
                beat, leave = beat_core(message)
                if leave is not None:
                    self._holder.left(beat, leave)
                    return
                await context.write(report_proto(self._holder.beat(beat)))
        except BatonError as error:
            await context.abort(*to_status(error))

    def _expect_meant(self, incarnation: int) -> None:
        mine = self._holder.incarnation
        if incarnation != mine:
            raise StaleReference(f"this is incarnation {mine}, not {incarnation}")
