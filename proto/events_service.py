"""The Events service of an instance's leader: what it tells of itself, to every gateway."""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import grpc

from baton.core.errors import BatonError, StaleReference
from baton.core.ids import Incarnation
from baton.core.instance_events import BlockChanges, CacheTerms, InstanceLoad
from baton.proto import events_pb2 as pb
from baton.proto import events_pb2_grpc as pb_grpc
from baton.proto.convert_events import events_proto
from baton.proto.errors import to_status


class EventSource(Protocol):
    """The instance."""

    incarnation: Incarnation
    terms: CacheTerms

    def follow(self) -> AsyncIterator[tuple[InstanceLoad, Sequence[BlockChanges]]]:
        """Tell everything from the beginning, then what is new, until the instance closes."""
        ...


def add_events_service(server: grpc.aio.Server, source: EventSource) -> None:
    """Let a server tell gateways of its instance."""
    pb_grpc.add_EventsServicer_to_server(EventsService(source), server)


class EventsService(pb_grpc.EventsServicer):
    """Serves every gateway on a stream of its own, as fast as that reads."""

    def __init__(self, source: EventSource) -> None:
        self._source = source

    async def Follow(  # noqa: N802  (the name in the .proto file)
        self,
        request: pb.FollowRequest,
        context: "grpc.aio.ServicerContext[pb.FollowRequest, pb.InstanceEvents]",
    ) -> None:
        """See proto/events.proto."""
        mine = self._source.incarnation
        try:
            if request.incarnation != mine:
                raise StaleReference(f"this is incarnation {mine}, not {request.incarnation}")
            terms: CacheTerms | None = self._source.terms
            async for load, changes in self._source.follow():
                await context.write(events_proto(load, changes, terms))
                terms = None
        except BatonError as error:
            await context.abort(*to_status(error))
