"""One Handover stream on the prefill side: performs what the Sender state machine decides."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

from baton.core.clock import Clock
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Unavailable,
)
from baton.core.handover import Abort, Offer, OfferedBlock, Open, Received, ToDecode, ToPrefill
from baton.core.ids import SeqId
from baton.core.log import get_logger, tag_request
from baton.core.moving_average import MovingAverage
from baton.core.tasks import TaskSet
from baton.engine.step import ChunkComputed, EngineEvent, Reserved, StepPlan, TokenSampled
from baton.executor.handover_orders import DigestOrder, HandoverTerms
from baton.executor.instance import Instance
from baton.executor.mesh_handover import MeshHandover
from baton.executor.prefix_pull import PrefixPull, PullTable
from baton.executor.staging import Staging
from baton.kv_transfer import sender_events as machine
from baton.kv_transfer.layer_groups import group_ends
from baton.kv_transfer.sender import Sender, SenderState
from baton.kv_transfer.sender_events import SenderAction, SenderEvent
from baton.kv_transfer.staging_pool import Claim

_QUEUE = 4096
"""Events of one stream: one per group of layers of a chunk, and the few messages of the peer."""
_UNREAD = 16
"""Messages of decode among them; the stream holds back what comes faster than it is handled."""
_WRITE_TIMEOUT_S = 10.0
"""For decode to take a message off our hands."""

_log = get_logger("prefill")


class HandoverSession:
    """Owns one attempt from the stream's first message to its end."""

    def __init__(
        self,
        instance: Instance,
        table: "SessionTable",
        sender: Sender,
        write: Callable[[ToDecode], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self.outcome = "cancelled"
        """`ok`, or the code of the error that ended it."""
        self._instance = instance
        self._table = table
        self._sender = sender
        self._write = write
        self._clock = clock
        self._events: asyncio.Queue[SenderEvent] = asyncio.Queue(_QUEUE)
        self._unread = asyncio.Semaphore(_UNREAD)
        self._limit = asyncio.timeout(None)
        self._open: Open | None = None
        self._handover: MeshHandover | None = None
        self._seq_id: SeqId | None = None
        self._pages: Claim | None = None
        self._copying: asyncio.Task[tuple[OfferedBlock, ...]] | None = None

    def __repr__(self) -> str:
        return f"HandoverSession(seq={self._seq_id}, {self._sender!r})"

    @property
    def request_id(self) -> str:
        """Whose prompt it is; empty before the stream's first message."""
        return "" if self._open is None else self._open.request.request_id

    @property
    def min_offer_bytes(self) -> float:
        """KV in an offer at least, where it is not the last of a chunk."""
        return self._sender.min_offer_bytes

    @property
    def unread_since(self) -> float:
        """When the last offer was made, if decode has not said Received; else infinite."""
        return self._sender.unread_since

    def post(self, event: SenderEvent) -> None:
        """Take an event of the engine; a session that is far behind is given up."""
        try:
            self._events.put_nowait(event)
        except asyncio.QueueFull:
            # Once only: a limit that is expiring, or over, cannot be changed.
            if self._limit.when() is None and self._sender.state is not SenderState.ENDED:
                self._limit.reschedule(asyncio.get_running_loop().time())

    async def run(self, incoming: AsyncIterator[ToPrefill]) -> None:
        """Serve the stream until the machine has ended; gives everything back in any case."""
        reader = asyncio.create_task(self._pump(incoming))
        try:
            async with self._limit:
                while self._sender.state is not SenderState.ENDED:
                    for action in self._sender.handle(await self._next_event(), self._clock()):
                        await self._perform(action)
        except TimeoutError:  # decode takes nothing off our hands
            self.outcome = DeadlineExceeded.code
        finally:
            reader.cancel()
            self._sender.handle(machine.StreamEnded(), self._clock())
            self._release()

    async def _pump(self, incoming: AsyncIterator[ToPrefill]) -> None:
        try:
            async for message in incoming:
                await self._unread.acquire()
                self.post(self._event_of(message))
        except BatonError as error:  # a malformed message
            self.post(machine.Failed(error))
        else:
            self.post(machine.StreamEnded())

    def _event_of(self, message: ToPrefill) -> SenderEvent:
        match message:
            case Open(request=request):
                self._open = message
                known = self._instance.engine.known_tokens(request)
                blocks = known // self._instance.layout.block_size
                return machine.Opened(message, blocks, self._table.token_s.value)
            case Offer() | Received() | Abort():
                return machine.PeerSaid(message)

    async def _next_event(self) -> SenderEvent:
        wait_s = self._sender.deadline - self._clock()
        try:
            async with asyncio.timeout(wait_s if wait_s != float("inf") else None):
                event = await self._events.get()
        except TimeoutError:
            return machine.Tick()
        if isinstance(event, machine.Opened | machine.PeerSaid):
            self._unread.release()
        return event

    async def _perform(self, action: SenderAction) -> None:
        match action:
            case machine.Submit():
                await self._submit(action)
            case machine.Pull(offer):
                self._pull(offer)
            case machine.Stage(blocks):
                self._stage(blocks)
            case machine.Send(message):
                await self._send(message)
            case machine.SendOffer():
                await self._send_offer(action)
            case machine.Release():
                self._release()
            case machine.End(outcome):
                self.outcome = outcome

    async def _submit(self, action: machine.Submit) -> None:
        message = action.message
        tag_request(message.request.request_id, message.request.traceparent)
        try:
            await self._instance.prepare(message.request)
        except BatonError as error:
            self.post(machine.Failed(error))
            return
        plan = self._sender.plan
        self._handover = self._instance.handover(
            HandoverTerms(
                plan.source,
                plan.target,
                message.compatibility,
                message.ticket,
                message.request.prompt,
                direct=self._sender.direct,
            )
        )
        try:
            self._seq_id = self._instance.engine.submit(message.request, hold=True)
        except BatonError as error:
            self.post(machine.Failed(error))
            return
        self._table[self._seq_id] = self

    def _stage(self, blocks: int) -> None:
        try:
            self._pages = self._staging.pool.claim(
                blocks, lambda pages: self.post(machine.Staged(pages))
            )
        except Unavailable as error:
            self.post(machine.Failed(error))

    @property
    def _staging(self) -> Staging:
        staging = self._instance.memory.staging
        assert staging is not None, "a pool that cannot be read, and no staging"
        return staging

    def _pull(self, offer: Offer) -> None:
        assert self._open is not None, "a pull before Open"
        pull = PrefixPull(self._instance, self._open, offer, self._table.pulls)
        task = self._table.tasks.start(pull.run())
        task.add_done_callback(lambda _: self.post(machine.PullEnded()))

    async def _send_offer(self, action: machine.SendOffer) -> None:
        # Pages are being written until the thread is done, whatever becomes of this session.
        self._copying = self._table.tasks.start(self._digest(action))
        offered = await asyncio.shield(self._copying)
        first = action.first
        if first is not None:
            first = replace(first, offer_s=max(0.0, self._clock() - self._sender.sampled_at))
        await self._send(
            Offer(
                attempt=action.attempt,
                index=action.index,
                layers=action.layers,
                first_block=action.first_block,
                blocks=offered,
                first=first,
            )
        )

    async def _send(self, message: ToDecode) -> None:
        async with asyncio.timeout(_WRITE_TIMEOUT_S):
            await self._write(message)

    async def _digest(self, action: machine.SendOffer) -> tuple[OfferedBlock, ...]:
        assert self._handover is not None, "an offer before Open"
        digests = await self._handover.digest(
            DigestOrder(action.layers, action.first_block, action.blocks, action.pages)
        )
        return tuple(map(OfferedBlock, action.pages or action.blocks, digests))

    def _release(self) -> None:
        if self._seq_id is not None:
            self._table.pop(self._seq_id, None)
            self._instance.engine.release(self._seq_id)
            self._seq_id = None
        handover, self._handover = self._handover, None
        if handover is not None:
            self._table.tasks.start(handover.close())
        pages, self._pages = self._pages, None
        if pages is None:
            return
        if self._copying is None or self._copying.done():
            self._staging.pool.give_back(pages)
        else:
            self._copying.add_done_callback(lambda _: self._staging.pool.give_back(pages))


class SessionTable(dict[SeqId, HandoverSession]):
    """The open sessions by sequence; listens to the engine and brings each its events."""

    instance: Instance | None = None
    """Set once it is there; no step runs before."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = TaskSet()
        """Pulls outlive their sessions, to pass their fence."""
        self.pulls = PullTable()
        self.token_s = MovingAverage()
        """What computing a token of a prompt takes."""

    def step_started(self, plan: StepPlan) -> Sequence[int]:
        """A step is about to run; return after which layers `layers_done` is to be called.

        After none where layers are computed in stages: there, chunks overlap as layers do.
        """
        assert self.instance is not None, "a step before the instance was there"
        layout = self.instance.layout
        ends: tuple[int, ...] = ()
        for scheduled in plan.sequences:
            session = self.get(scheduled.seq_id)
            if session is not None:
                blocks = self.instance.engine.blocks(scheduled.seq_id)
                session.post(machine.Started(scheduled.start, blocks))
                whole = layout.blocks_for(scheduled.end) - scheduled.start // layout.block_size
                wanted = group_ends(layout, whole, session.min_offer_bytes)
                ends = max(ends, wanted, key=len)
        return ends if self.instance.tells_layers else ()

    def layers_done(self, plan: StepPlan, layers: int) -> None:
        """The step under way has computed all layers before `layers`."""
        for scheduled in plan.sequences:
            session = self.get(scheduled.seq_id)
            if session is not None:
                session.post(machine.LayersReady(scheduled.end, layers))

    def step_ran(self, plan: StepPlan, seconds: float) -> None:
        """See Listener."""
        self.token_s.add(seconds / plan.num_tokens)

    def step_done(self, events: Sequence[EngineEvent]) -> None:
        """A step has run."""
        assert self.instance is not None, "a step before the instance was there"
        for event in events:
            session = self.get(event.seq_id)
            match event:
                case ChunkComputed(seq_id, end) if session:
                    session.post(machine.ChunkReady(end, self.instance.engine.blocks(seq_id)))
                case Reserved():
                    self.pulls.granted(event)
                case TokenSampled() if session:
                    session.post(machine.Sampled(event.token, event.logprobs))

    def step_failed(self, seq_ids: Sequence[SeqId], error: Exception) -> None:
        """These sequences are gone: a step raised, or they ask for what cannot be done."""
        lost: BatonError
        if isinstance(error, InvalidRequest):
            lost = error
        else:
            lost = InternalError(f"the model failed in a step: {error!r}")
            requests = [self[seq].request_id for seq in seq_ids if seq in self]
            _log.error("a step failed", requests=requests, exc_info=error)
        for seq_id in seq_ids:
            if seq_id in self:
                self[seq_id].post(machine.Failed(lost))
