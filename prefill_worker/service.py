"""The gRPC service of a prefill leader."""

from collections import Counter
from collections.abc import AsyncIterator

import grpc

from baton.core.clock import Clock
from baton.core.errors import BatonError
from baton.core.handover import Accepted, ToDecode, ToPrefill
from baton.core.log import get_logger
from baton.executor.admission import Admission
from baton.executor.instance import Instance
from baton.kv_transfer import sender_events as machine
from baton.kv_transfer.sender import Sender
from baton.prefill_worker.session import HandoverSession, SessionTable
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.convert import to_decode_proto, to_prefill_core
from baton.proto.drain_call import answer_drain

_log = get_logger("prefill")

Stream = grpc.aio.ServicerContext[pb.ToPrefill, pb.ToDecode]


class PrefillService(pb_grpc.PrefillServicer):
    """Serves one HandoverSession per stream."""

    def __init__(self, instance: Instance, table: SessionTable, clock: Clock) -> None:
        self.outcomes: Counter[str] = Counter()
        """Ended streams by outcome."""
        self._instance = instance
        self._table = table
        self._clock = clock
        self.admission = Admission(instance.config.instance_id)
        """Of streams."""
        self._sessions: set[HandoverSession] = set()

    async def Handover(
        self, request_iterator: AsyncIterator[pb.ToPrefill], context: Stream
    ) -> None:
        """Serve one attempt of one handover; see proto/worker.proto."""
        session = HandoverSession(
            self._instance, self._table, self._new_sender(), _writer(context), self._clock
        )
        try:
            self.admission.enter()
        except BatonError as error:
            session.post(machine.Failed(error))
            await session.run(_messages(request_iterator))
            return
        self._sessions.add(session)
        try:
            await session.run(_messages(request_iterator))
        finally:
            self._sessions.remove(session)
            self.admission.leave()
            self.outcomes[session.outcome] += 1
            if session.outcome not in ("ok", "cancelled"):
                _log.warning(
                    "handover ended",
                    request=session.request_id,
                    outcome=session.outcome,
                    session=repr(session),
                )

    async def Drain(
        self,
        request: pb.DrainRequest,
        context: grpc.aio.ServicerContext[pb.DrainRequest, pb.DrainReply],
    ) -> pb.DrainReply:
        """See proto/worker.proto."""
        return await answer_drain(request, context, self.drain)

    async def drain(self, deadline_s: float) -> int:
        """See Worker."""
        return await self.admission.drain(deadline_s, self._hand_over)

    async def fence(self) -> None:
        """See Worker."""
        await self.admission.fence(self._hand_over)

    def _hand_over(self) -> int:
        for session in self._sessions:
            session.post(machine.Failed(self.admission.refusal()))
        return len(self._sessions)

    def _new_sender(self) -> Sender:
        instance = self._instance
        return Sender(
            compatibility=instance.compatibility,
            accepted=Accepted(
                instance.incarnation,
                instance.sharded,
                instance.transports,
                instance.kv.num_blocks,
            ),
            config=instance.config.handover,
            now=self._clock(),
            staged=instance.memory.on_device,
            direct=instance.direct if instance.direct.transports else None,
        )


async def _messages(stream: AsyncIterator[pb.ToPrefill]) -> AsyncIterator[ToPrefill]:
    async for message in stream:
        yield to_prefill_core(message)


def _writer(context: Stream):  # type: ignore[no-untyped-def]
    async def write(message: ToDecode) -> None:
        await context.write(to_decode_proto(message))

    return write
