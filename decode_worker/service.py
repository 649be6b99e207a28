"""The gRPC service of a decode leader: one Session per gateway, every request on it."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator

import grpc

from baton.core.errors import (
    BatonError,
    Cancelled,
    HandoverError,
    InternalError,
    InvalidRequest,
)
from baton.core.ids import Incarnation, InstanceId
from baton.core.log import get_logger
from baton.core.request import FinishReason
from baton.decode_worker.attempt import AttemptHost
from baton.decode_worker.outbox import Outbox
from baton.decode_worker.owner import OwnerTable, RequestOwner, Submission
from baton.decode_worker.peer_channels import PeerRef
from baton.executor.admission import Admission
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.convert import error_proto, request_core
from baton.proto.convert_backup import backup_core
from baton.proto.drain_call import answer_drain
from baton.proto.errors import to_status

_log = get_logger("decode")

Stream = grpc.aio.ServicerContext[pb.GatewayFrame, pb.DecodeFrame]


class DecodeService(pb_grpc.DecodeServicer):
    """Serves gateways; a gateway that goes away takes its requests with it."""

    def __init__(self, host: AttemptHost, owners: OwnerTable) -> None:
        engine, name = host.instance.config.engine, host.instance.config.instance_id
        limit = engine.max_waiting + engine.max_sequences
        self.admission = Admission(name, limit=limit)
        """Of requests: as many as engine and queue hold."""
        self.finished: Counter[str] = Counter()
        """Requests that ended, by reason."""
        self._host = host
        self._owners = owners
        self._sessions: set[_Session] = set()

    async def Session(
        self, request_iterator: AsyncIterator[pb.GatewayFrame], context: Stream
    ) -> None:
        """Serve one gateway until its stream ends; see proto/worker.proto.

        While the instance is fenced, it does not greet: how long to wait for that is the gateway's.
        """
        await self.admission.until_unfenced()
        instance = self._host.instance
        hello = pb.Hello(instance_id=instance.config.instance_id, incarnation=instance.incarnation)
        await context.write(pb.DecodeFrame(hello=hello))
        session = _Session(self, self._host, self._owners)
        self._sessions.add(session)
        try:
            problem = await session.serve(request_iterator, context)
        finally:
            await session.close()
            self._sessions.remove(session)
        if problem is not None:
            await context.abort(*to_status(problem))

    async def Drain(
        self,
        request: pb.DrainRequest,
        context: grpc.aio.ServicerContext[pb.DrainRequest, pb.DrainReply],
    ) -> pb.DrainReply:
        """See proto/worker.proto."""
        return await answer_drain(request, context, self.drain)

    async def Backup(
        self,
        request: pb.BackupRequest,
        context: grpc.aio.ServicerContext[pb.BackupRequest, pb.BackupReply],
    ) -> pb.BackupReply:
        """See proto/worker.proto."""
        try:
            self.admission.expect_open()
            cached = await self._host.store.take(*backup_core(request))
        except BatonError as error:
            await context.abort(*to_status(error))
        return pb.BackupReply(cached_blocks=cached)

    async def drain(self, deadline_s: float) -> int:
        """See Worker."""
        return await self.admission.drain(deadline_s, self._hand_over)

    async def fence(self) -> None:
        """See Worker."""
        await self.admission.fence(self._hand_over)

    def _hand_over(self) -> int:
        error = self.admission.refusal()
        return sum(session.hand_over(error) for session in self._sessions)


class _Session:
    """One gateway's stream."""

    def __init__(self, service: DecodeService, host: AttemptHost, owners: OwnerTable) -> None:
        self._service = service
        self._host = host
        self._owners = owners
        self._outbox = Outbox()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._open: dict[int, RequestOwner] = {}

    async def serve(
        self, frames: AsyncIterator[pb.GatewayFrame], context: Stream
    ) -> BatonError | None:
        """Read and write until the gateway ends the stream; return what is wrong, if it breaks."""
        reader = asyncio.create_task(self._read_from(frames))
        writer = asyncio.create_task(self._write_to(context))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            writer.cancel()
            ended = await asyncio.gather(reader, writer, return_exceptions=True)
        return next((_told(error) for error in ended if isinstance(error, Exception)), None)

    async def _write_to(self, context: Stream) -> None:
        """Send a frame per step, for as long as the stream lives."""
        while True:
            await context.write(await self._outbox.next_frame())

    async def _read_from(self, frames: AsyncIterator[pb.GatewayFrame]) -> None:
        """Take what the gateway sends; raises HandoverError for what no gateway would send."""
        async for frame in frames:
            match frame.WhichOneof("frame"):
                case "submit":
                    self._submit(frame.submit)
                case "cancel":
                    self._cancel(frame.cancel.key)
                case other:
                    raise HandoverError(f"malformed message: GatewayFrame.frame: {other!r}")

    def _submit(self, message: pb.Submit) -> None:
        if message.key in self._tasks:
            raise HandoverError(f"malformed message: Submit.key: {message.key} is in use")
        try:
            submission = _submission(message)
            self._service.admission.enter()
        except BatonError as error:
            finish = pb.Finish(reason=FinishReason.ERROR, error=error_proto(error))
            self._outbox.finish(message.key, finish)
            self._outbox.flush()
            return
        owner = RequestOwner(submission, self._host, self._owners, self._outbox)
        task = self._host.tasks.start(owner.run())
        self._tasks[submission.key] = task
        self._open[submission.key] = owner
        task.add_done_callback(lambda _: self._ended(submission.key, owner))

    def _ended(self, key: int, owner: RequestOwner) -> None:
        del self._tasks[key], self._open[key]
        self._service.admission.leave()
        if owner.reason is None:  # cancelled before it ran at all
            owner.fail(Cancelled("the caller asked for it"))
        self._service.finished[str(owner.reason)] += 1

    def _cancel(self, key: int) -> None:
        task = self._tasks.get(key)
        if task is not None:  # it may have ended while the message was on its way
            task.cancel()

    def hand_over(self, error: BatonError) -> int:
        """End what is open with an error that lets the gateway go on elsewhere; return how many."""
        for key, owner in self._open.items():
            owner.fail(error)
            self._tasks[key].cancel()
        return len(self._open)

    async def close(self) -> None:
        """Cancel what is still open and wait until it has given everything back."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _told(error: Exception) -> BatonError:
    """Return what the gateway is told: who reads on where nobody writes would wait for nothing."""
    if isinstance(error, BatonError):
        return error
    _log.error("a session broke", exc_info=error)
    return InternalError(f"the session broke: {error!r}")


def _submission(message: pb.Submit) -> Submission:
    """Take a submission off the wire; InvalidRequest if it makes no sense."""
    if not 0 < message.timeout_s < math.inf:  # false for NaN too
        raise InvalidRequest("timeout_s", message.timeout_s, "a finite number of seconds above 0")
    return Submission(
        message.key,
        request_core(message.request),
        tuple(map(_peer, message.prefill)),
        message.timeout_s,
        _peer(message.backup) if message.HasField("backup") else None,
    )


def _peer(ref: pb.InstanceRef) -> PeerRef:
    return PeerRef(InstanceId(ref.instance_id), ref.address, Incarnation(ref.incarnation))
