"""One attempt of one handover on the decode side: performs what the Receiver machine decides."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import grpc

from baton.core.clock import Clock
from baton.core.errors import (
    BatonError,
    HandoverError,
    InternalError,
    PeerLost,
    TransportError,
)
from baton.core.handover import (
    PROTOCOL_VERSION,
    BlockRef,
    FirstToken,
    Offer,
    OfferedBlock,
    Open,
    ToPrefill,
    Want,
)
from baton.core.ids import Attempt, InstanceId, SeqId, new_ticket
from baton.core.log import get_logger
from baton.core.moving_average import MovingAverage
from baton.core.request import GenerateRequest
from baton.core.spans import HandoverWait
from baton.core.tasks import TaskSet
from baton.core.trace import HandoverTrace
from baton.decode_worker.backup import Backups
from baton.decode_worker.backup_store import BackupStore
from baton.decode_worker.peer_channels import PeerChannels, PeerRef
from baton.decode_worker.placement import Placement
from baton.executor.handover_orders import DigestOrder, HandoverTerms, ReadOrder
from baton.executor.instance import Instance
from baton.executor.mesh_handover import MeshHandover
from baton.executor.rank_handover import joined
from baton.kv_transfer import receiver_events as machine
from baton.kv_transfer.plan import TransferPlan, plan_between
from baton.kv_transfer.receiver import Receiver
from baton.kv_transfer.receiver_events import ReceiverAction, ReceiverEvent
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as pb_grpc
from baton.proto.convert import to_decode_core, to_prefill_proto
from baton.proto.errors import from_rpc_error

_QUEUE = 4096
"""Events of one attempt: one per offer, per read, and a few more."""
_TELLING_BYTES = 1 << 16
"""A smaller read says more of latency than of bandwidth."""
_UNREAD = 256
"""Messages of prefill among them; the stream holds back what comes faster than it is handled."""
_SEND_TIMEOUT_S = 5.0
"""For prefill to take a message off our hands."""
_PART_TIMEOUT_S = 2.0
"""For prefill to end the stream after our last word."""

_log = get_logger("decode")

Stream = grpc.aio.StreamStreamCall[pb.ToPrefill, pb.ToDecode]


@dataclass(frozen=True, slots=True)
class AttemptHost:
    """What all attempts of one decode instance share."""

    instance: Instance
    channels: PeerChannels
    clock: Clock
    tasks: TaskSet
    """Attempts outlive their owners, to pass their fence."""
    placement: Placement
    backups: Backups
    """Of what is decoded here."""
    store: BackupStore
    """Of what others decode."""
    bandwidth: MovingAverage = field(default_factory=MovingAverage)
    """Of reads, in bytes per second."""
    attempts: "dict[SeqId, HandoverAttempt]" = field(default_factory=dict)
    """Attempts that wait for room, or read, by their reserved sequence."""
    running: "set[HandoverAttempt]" = field(default_factory=set)
    """All attempts, those that only wait for their fence included."""
    not_direct: set[InstanceId] = field(default_factory=set)
    """Prefill instances whose pools on devices turned out not to be readable from here."""


class HandoverAttempt:
    """Runs as a task of its own until nothing of it can be read or written any more.

    `landed` is done as soon as the owner can go on: with the first token, or with the error for
    which it must try another way. The task may live on after that, to pass the fence.
    """

    def __init__(
        self, host: AttemptHost, request: GenerateRequest, prefill: PeerRef, attempt: Attempt
    ) -> None:
        instance = host.instance
        self.prefill = prefill
        self.seq_id: SeqId | None = None
        """The reserved sequence; ours until it has landed, then the owner's."""
        self.landed: asyncio.Future[FirstToken] = asyncio.get_running_loop().create_future()
        self._instance = instance
        self._host = host
        self._clock = host.clock
        self._began = host.clock()
        self._open = Open(
            version=PROTOCOL_VERSION,
            compatibility=instance.compatibility,
            layout=instance.sharded,
            decode_instance=InstanceId(instance.config.instance_id),
            decode_incarnation=instance.incarnation,
            ticket=new_ticket(),
            attempt=attempt,
            request=request,
            bytes_per_s=host.bandwidth.value or 0.0,
            cached_blocks=_shareable_blocks(instance, request),
            transports=instance.transports,
            place_blocks=instance.kv.num_blocks,
            device_ways=() if prefill.instance_id in host.not_direct else instance.direct.ways,
        )
        self._machine = Receiver(
            self._open, config=instance.config.handover, landing=instance.memory.landing
        )
        self._events: asyncio.Queue[ReceiverEvent] = asyncio.Queue(_QUEUE)
        self._unread = asyncio.Semaphore(_UNREAD)
        self._handover: MeshHandover | None = None
        """Made once prefill has said how its KV lies, which is:"""
        self._prefill_layout = instance.sharded
        self._stream: Stream | None = None
        self._pinned: SeqId | None = None
        self._shared: MeshHandover | None = None
        """What is pinned, as prefill may read it."""
        self._outcome = "cancelled"
        self._abandoned = False

    def __repr__(self) -> str:
        return f"HandoverAttempt({self.prefill.instance_id}, seq={self.seq_id}, {self._machine!r})"

    @property
    def trace(self) -> HandoverTrace:
        """Where the time went so far."""
        return self._machine.trace(self.prefill.instance_id, self._outcome)

    @property
    def wait(self) -> HandoverWait:
        """How it was waited for; it must have landed."""
        return self._machine.wait(self._began)

    @property
    def reading_since(self) -> float:
        """When the reads that are under way began; infinite if none are."""
        return self._machine.reading_since

    def granted(self, blocks: tuple[BlockRef, ...], cached: int) -> None:
        """The engine has room for the prompt, and the KV of its first `cached` blocks."""
        self._events.put_nowait(machine.Granted(blocks, cached))

    def abandon(self) -> None:
        """The owner is gone without having taken what landed, or before anything did."""
        self._abandoned = True
        if self._outcome == "ok":
            self._release()
        else:
            self._events.put_nowait(machine.CancelRequested("the owner is gone"))

    def _release(self) -> None:
        assert self.seq_id is not None, "landed on nothing"
        self._instance.engine.release(self.seq_id)

    async def run(self) -> None:
        """Run to the end, the fence included; whatever happens, the owner is told."""
        self._host.running.add(self)
        try:
            await self._run()
        finally:
            if not self._machine.over:  # a bug, or cancelled at shutdown
                await self._give_up()
            await self._close()
            self._host.running.discard(self)
            if not self.landed.done():
                self.landed.set_exception(InternalError("the handover's task ended early"))
                self.landed.exception()  # the owner may be gone

    async def _give_up(self) -> None:
        """Give back what is reserved, once nothing can be read into it any more."""
        self._outcome = InternalError.code
        if self.seq_id is not None and self._host.attempts.pop(self.seq_id, None) is self:
            self._instance.engine.fence(self.seq_id)
        await self._close()
        if self.seq_id is not None:
            self._instance.engine.fence_passed(self.seq_id)

    async def _run(self) -> None:
        channels = self._host.channels
        async with channels.channel(self.prefill) as channel, asyncio.TaskGroup() as tasks:
            self._stream = pb_grpc.PrefillStub(channel).Handover()
            reader = tasks.create_task(self._pump(self._stream))
            try:
                actions = self._machine.start(self._clock())
                while True:
                    for action in actions:
                        await self._perform(action, tasks)
                    if self._machine.over:
                        break
                    actions = self._machine.handle(await self._next_event(), self._clock())
                await self._part(reader)
            finally:
                self._unshare()
                reader.cancel()
                self._stream.cancel()

    async def _part(self, reader: "asyncio.Task[None]") -> None:
        """Let prefill read our last word before the stream is closed."""
        assert self._stream is not None, "not running"
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(_PART_TIMEOUT_S):
                await self._stream.done_writing()
        await asyncio.wait({reader}, timeout=_PART_TIMEOUT_S)

    async def _pump(self, stream: Stream) -> None:
        try:
            async for message in stream:
                await self._unread.acquire()
                self._events.put_nowait(machine.PeerSaid(to_decode_core(message)))
            error: BatonError = HandoverError("prefill closed the stream")
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
        except BatonError as malformed:
            error = malformed
        except asyncio.CancelledError:
            _raise_if_cancelled()
            error = PeerLost("the channel to prefill was closed")
        await self._events.put(machine.StreamEnded(error))

    async def _next_event(self) -> ReceiverEvent:
        wait_s = self._machine.deadline - self._clock()
        try:
            async with asyncio.timeout(wait_s if wait_s != float("inf") else None):
                event = await self._events.get()
        except TimeoutError:
            return machine.Tick()
        if isinstance(event, machine.PeerSaid):
            self._unread.release()
        return event

    async def _perform(self, action: ReceiverAction, tasks: asyncio.TaskGroup) -> None:
        engine = self._instance.engine
        match action:
            case machine.Send(message):
                await self._send(message)
            case machine.Connect():
                self._prefill_layout = action.plan.source
                self._handover = self._new_handover(action.plan, direct=action.direct)
                tasks.create_task(self._connect(self._handover, action))
            case machine.Reserve():
                self._reserve()
            case machine.Read():
                tasks.create_task(self._read(action))
            case machine.Share(want):
                self._pinned = engine.pin(self._open.request, want.end_block)
                tasks.create_task(self._share(want))
            case machine.Unshare():
                self._unshare()
            case machine.DropPeer():
                tasks.create_task(self._drop_peer())
            case machine.Land(first):
                self._land(first)
            case machine.Fail(error, fenced):
                self._fail(error, fenced=fenced)
            case machine.FencePassed():
                assert self.seq_id is not None, "a fence around nothing"
                engine.fence_passed(self.seq_id)

    async def _send(self, message: ToPrefill) -> None:
        assert self._stream is not None, "not running"
        # If the stream is gone, the reader says so with the reason.
        # It is gone too if prefill takes nothing more: a write that is given up cancels the call.
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await self._stream.write(to_prefill_proto(message))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            return
        except asyncio.CancelledError:
            _raise_if_cancelled()

    def _reserve(self) -> None:
        try:
            self.seq_id = self._instance.engine.reserve(self._open.request)
        except BatonError as error:
            self._events.put_nowait(machine.StreamEnded(error))
            return
        self._host.attempts[self.seq_id] = self

    async def _share(self, want: Want) -> None:
        """Offer what the cache still has of what prefill wants; it stays until `_unshare`."""
        pinned = self._pinned
        table = () if pinned is None else self._instance.engine.blocks(pinned)
        refs = table[want.first_block : want.end_block]
        layers = self._instance.layout.all_layers
        # It goes the other way than the rest.
        self._shared = self._new_handover(plan_between(self._open.layout, self._prefill_layout))
        digests = await self._shared.digest(DigestOrder(layers, want.first_block, refs))
        blocks = tuple(map(OfferedBlock, refs, digests))
        await self._send(Offer(self._open.attempt, 0, layers, want.first_block, blocks))

    def _new_handover(self, plan: TransferPlan, *, direct: bool = False) -> MeshHandover:
        return self._instance.handover(
            HandoverTerms(
                plan.source,
                plan.target,
                self._open.compatibility,
                self._open.ticket,
                self._open.request.prompt,
                staged=self._instance.memory.on_device and not direct,
                direct=direct,
            )
        )

    def _unshare(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            self._host.tasks.start(shared.close())
        pinned, self._pinned = self._pinned, None
        if pinned is not None:
            self._instance.engine.release(pinned)

    def _land(self, first: FirstToken) -> None:
        assert self.seq_id is not None, "landed on nothing"
        del self._host.attempts[self.seq_id]
        self._outcome = "ok"
        if self._abandoned or self.landed.cancelled():
            self._release()
        else:
            self.landed.set_result(first)

    def _fail(self, error: BatonError, *, fenced: bool) -> None:
        self._outcome = error.code
        if self.seq_id is not None:
            self._host.attempts.pop(self.seq_id, None)
            if fenced:
                self._instance.engine.release(self.seq_id)
            else:
                self._instance.engine.fence(self.seq_id)
        if not (self._abandoned or self.landed.cancelled()):
            self.landed.set_exception(error)

    async def _connect(self, handover: MeshHandover, action: machine.Connect) -> None:
        try:
            await handover.connect(action.transports, action.place_blocks)
        except TransportError as error:
            if action.direct:  # such as another container; the next attempt goes through staging
                self._host.not_direct.add(self.prefill.instance_id)
                _log.warning("no direct reads", prefill=self.prefill.instance_id, why=str(error))
            self._events.put_nowait(machine.Connected(error))
        else:
            self._events.put_nowait(machine.Connected())

    async def _drop_peer(self) -> None:
        if self._handover is not None:
            _log.warning("peer dropped to fence its reads", handover=repr(self._handover))
            await self._handover.drop()

    async def _close(self) -> None:
        """Return once nothing of this attempt can be read into our blocks any more."""
        handover, self._handover = self._handover, None
        if handover is not None:
            await handover.close()

    async def _read(self, action: machine.Read) -> None:
        """Read an offer and verify it; ends in exactly one ReadEnded."""
        assert self._handover is not None, "a read before prefill accepted"
        offer, blocks = action.offer, tuple(ref.block for ref in action.blocks)
        order = ReadOrder(offer.layers, action.tokens, offer.blocks, blocks)
        try:
            reports = await self._handover.read(order)
        except BatonError as error:
            self._events.put_nowait(machine.ReadEnded(offer.index, 0, "", error))
            return
        report = joined(reports)
        if report.bytes >= _TELLING_BYTES:
            self._host.bandwidth.add(report.bytes / report.seconds)
        ranks = tuple(machine.RankRead(part.bytes, part.seconds) for part in reports)
        ended = machine.ReadEnded(offer.index, report.bytes, report.transport, ranks=ranks)
        self._events.put_nowait(ended)


def _shareable_blocks(instance: Instance, request: GenerateRequest) -> int:
    """Return how many blocks of the prompt, from the first, prefill may read from the cache."""
    if instance.memory.on_device:
        return 0
    return instance.engine.known_tokens(request) // instance.layout.block_size


def _raise_if_cancelled() -> None:
    """Go on with a CancelledError if it is this task's; gRPC raises it for a closed channel too."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
