"""Decode's side of one attempt of one handover: event in, list of actions out.

    OPENING ─Accepted─▶ WAITING ─first Offer─▶ RECEIVING ─all read and verified─▶ LANDED
       └───────────────────┴── Refused, StreamEnded, Cancelled, Tick, bad read ──▶ FENCING ─▶ FAILED

Late reservation: no block is asked for before the first offer. Reads start when blocks are granted
and the peer is connected. Every Read and Connect ends in exactly one event. A failure while reads
are under way goes through FENCING: blocks come back only after the last read has ended, because
until then it may still write them. No clock but the one passed in, no I/O.
"""

from dataclasses import replace
from enum import StrEnum

from baton.core.config import HandoverConfig
from baton.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    Draining,
    HandoverError,
    Incompatible,
    Unavailable,
    all_errors,
)
from baton.core.handover import (
    Abort,
    Accepted,
    BlockRef,
    FirstToken,
    Offer,
    Open,
    Pulled,
    Received,
    Refused,
    ToDecode,
    Want,
)
from baton.core.spans import HandoverWait
from baton.core.trace import HandoverTrace
from baton.kv_transfer.landing import Landing, landing_plan
from baton.kv_transfer.plan import TokenRange
from baton.kv_transfer.receiver_events import (
    CancelRequested,
    Connect,
    Connected,
    DropPeer,
    Fail,
    FencePassed,
    Granted,
    Land,
    PeerSaid,
    Read,
    ReadEnded,
    ReceiverAction,
    ReceiverEvent,
    Reserve,
    Send,
    Share,
    StreamEnded,
    Tick,
    Unshare,
)
from baton.kv_transfer.timeline import Timeline


class ReceiverState(StrEnum):
    """Where the attempt stands."""

    OPENING = "opening"
    WAITING = "waiting"
    RECEIVING = "receiving"
    FENCING = "fencing"
    LANDED = "landed"
    FAILED = "failed"


_IN_POOL = Landing()
_OVER = (ReceiverState.LANDED, ReceiverState.FAILED)


class Receiver:
    """One attempt, seen from decode."""

    def __init__(self, open_: Open, *, config: HandoverConfig, landing: Landing = _IN_POOL) -> None:
        self.state = ReceiverState.OPENING
        self.deadline = float("inf")
        """When to send Tick, on the clock of `now`."""
        self._open = open_
        self._layout = open_.layout.model
        self._tokens = len(open_.request.prompt)
        self._num_blocks = 0
        """Of prefill's, that the prompt lies in; known once accepted."""
        self._source_size = 0
        """Tokens in one of them."""
        self._config = config
        self._landing = landing
        self._shared = False
        self._connected = False
        self._blocks: tuple[BlockRef, ...] | None = None
        self._cached = 0
        self._waiting: list[Offer] = []
        self._reading: set[int] = set()
        self._offers = 0
        self._offered_blocks = 0
        """With all their layers."""
        self._open_range: Offer | None = None
        """The last offer, if layers of its blocks are still to come."""
        self._first: FirstToken | None = None
        self._times = Timeline()

    def __repr__(self) -> str:
        return (
            f"Receiver({self.state}, offers={self._offers}, reading={len(self._reading)}, "
            f"blocks={self._offered_blocks}/{self._num_blocks})"
        )

    @property
    def over(self) -> bool:
        """Nothing will happen any more."""
        return self.state in _OVER

    @property
    def reading(self) -> bool:
        """Whether reads that may write decode's blocks are under way."""
        return bool(self._reading)

    @property
    def reading_since(self) -> float:
        """When the reads that are under way began; infinite if none are."""
        return self._times.reading_since

    def start(self, now: float) -> list[ReceiverAction]:
        """Begin: send Open."""
        self._times.opened(now)
        self.deadline = now + self._config.accept_timeout_s
        return [Send(self._open)]

    def trace(self, prefill_instance: str, outcome: str) -> HandoverTrace:
        """Return where the time went."""
        return self._times.trace(prefill_instance, self._open.attempt, outcome, self._first)

    def wait(self, began: float) -> HandoverWait:
        """Return how it was waited for since the attempt began; it must have landed."""
        assert self._first is not None, "not landed"
        return self._times.wait(began, self._first)

    def handle(self, event: ReceiverEvent, now: float) -> list[ReceiverAction]:
        """Take one event at time `now` (seconds) and return what to do, in order."""
        if isinstance(event, ReadEnded):
            return self._read_ended(event, now)  # counts in every state: it passes the fence
        if self.over:
            return []
        if self.state is ReceiverState.FENCING:
            return self._tick(now) if isinstance(event, Tick) else []
        match event:
            case PeerSaid(message):
                return self._peer_said(message, now)
            case Connected(error):
                return self._connection(error, now)
            case Granted(blocks, cached):
                return self._granted(blocks, cached, now)
            case StreamEnded(error):
                return self._fail(error, now)
            case CancelRequested(reason):
                return self._fail(Cancelled(reason), now)
            case Tick():
                return self._tick(now)

    def _peer_said(self, message: ToDecode, now: float) -> list[ReceiverAction]:
        match message:
            case Accepted():
                return self._accepted(message, now)
            case Offer():
                return self._offered(message, now)
            case Want():
                return self._wanted(message, now)
            case Pulled():
                return [Unshare()]
            case Refused(code, text):
                return self._fail(_refusal(code, text), now)

    def _accepted(self, message: Accepted, now: float) -> list[ReceiverAction]:
        if self.state is not ReceiverState.OPENING:
            return self._fail(HandoverError("prefill accepted twice"), now)
        try:
            landing = _IN_POOL if message.direct else self._landing
            plan = landing_plan(message.layout, self._open.layout, landing)
        except Incompatible as error:
            return self._fail(error, now)
        if message.direct and not self._open.device_ways:
            return self._fail(HandoverError("prefill counts on reads that decode cannot do"), now)
        self.state = ReceiverState.WAITING
        self._source_size = plan.source.model.block_size
        self._num_blocks = plan.source.model.blocks_for(self._tokens)
        self._times.accepted(now)
        self.deadline = now + self._config.offer_timeout_s
        return [Connect(message.transports, message.place_blocks, plan, message.direct)]

    def _wanted(self, want: Want, now: float) -> list[ReceiverAction]:
        if self.state is not ReceiverState.WAITING or self._shared:
            return self._fail(HandoverError("prefill wants KV at the wrong time"), now)
        if want.attempt != self._open.attempt or want.end_block > self._open.cached_blocks:
            return self._fail(HandoverError(f"{want} is more than was told of"), now)
        self._shared = True
        return [Share(want)]

    def _connection(self, error: BatonError | None, now: float) -> list[ReceiverAction]:
        if error is not None:
            return self._fail(error, now)
        self._connected = True
        self._times.connected(now)
        return self._go_on(now)

    def _offered(self, offer: Offer, now: float) -> list[ReceiverAction]:
        problem = self._problem(offer)
        if problem:
            return self._fail(HandoverError(problem), now)
        self.state = ReceiverState.RECEIVING
        self._offers += 1
        whole = offer.layers.end == self._layout.layers
        self._open_range = None if whole else offer
        if whole:
            self._offered_blocks += len(offer.blocks)
        self._first = offer.first
        self._waiting.append(offer)
        self._times.offered(now, offer, len(offer.blocks) if whole else 0)
        if self._offers == 1:
            self.deadline = now + self._config.room_timeout_s
            return [Reserve()]
        return self._go_on(now)

    def _problem(self, offer: Offer) -> str | None:
        """Say what is wrong with an offer, if something is; prefill is not trusted to count."""
        if self.state is ReceiverState.OPENING:
            return "prefill offered before it accepted"
        if offer.attempt != self._open.attempt:
            return f"an offer of attempt {offer.attempt} in attempt {self._open.attempt}"
        if self._first is not None:
            return "an offer after the last one"
        if offer.index != self._offers or offer.first_block != self._offered_blocks:
            return f"offer {offer.index} at block {offer.first_block} is out of order"
        if not (offer.blocks or offer.first):
            return "an offer of nothing"
        return self._layers_problem(offer) or self._count_problem(offer)

    def _layers_problem(self, offer: Offer) -> str | None:
        before = self._open_range
        start = 0 if before is None else before.layers.end
        if offer.layers.start != start or not start < offer.layers.end <= self._layout.layers:
            return f"layers {offer.layers.start} to {offer.layers.end} are out of order"
        if before is not None and len(before.blocks) != len(offer.blocks):
            return f"layers from {start} of {len(offer.blocks)} blocks, not {len(before.blocks)}"
        return None

    def _count_problem(self, offer: Offer) -> str | None:
        total = self._offered_blocks + len(offer.blocks)
        if total > self._num_blocks:
            return f"{total} blocks offered for a prompt of {self._num_blocks}"
        whole = total == self._num_blocks and offer.layers.end == self._layout.layers
        if offer.first is not None and not whole:
            return f"{total} blocks offered for a prompt of {self._num_blocks}, and no more to come"
        return None

    def _granted(
        self, blocks: tuple[BlockRef, ...], cached: int, now: float
    ) -> list[ReceiverAction]:
        assert len(blocks) >= self._layout.blocks_for(self._tokens), "all or nothing"
        self._blocks = blocks
        self._cached = cached
        self._times.granted(now, cached * self._layout.block_size // self._source_size)
        return self._go_on(now)

    def _go_on(self, now: float) -> list[ReceiverAction]:
        """Start every read that may start; land if there is none left to wait for."""
        if self._blocks is None or not self._connected:
            return []
        reads = [read for offer in self._waiting if (read := self._read(offer, self._blocks))]
        self._waiting.clear()
        if reads:
            self._reading.update(read.offer.index for read in reads)
            self._times.reading(now, [read.offer.index for read in reads])
        if self._first is not None and not self._reading:
            self.state = ReceiverState.LANDED
            self._times.landed(now)
            self.deadline = float("inf")
            return [Send(Received(self._open.attempt)), Land(self._first)]
        limit = self._config.read_timeout_s if self._reading else self._config.offer_timeout_s
        self.deadline = now + limit
        return [*reads]

    def _read(self, offer: Offer, blocks: tuple[BlockRef, ...]) -> Read | None:
        """Return the read of what decode lacks of an offer, if it lacks anything."""
        theirs, ours = self._source_size, self._layout.block_size
        start = max(offer.first_block * theirs, self._cached * ours)
        end = min((offer.first_block + len(offer.blocks)) * theirs, self._tokens)
        if start >= end:
            return None
        first = start // theirs
        lacking = offer.blocks[first - offer.first_block :]
        return Read(
            replace(offer, first_block=first, blocks=lacking),
            blocks[start // ours : self._layout.blocks_for(end)],
            TokenRange(start, end),
        )

    def _read_ended(self, event: ReadEnded, now: float) -> list[ReceiverAction]:
        assert event.index in self._reading, f"read {event.index} ended twice"
        self._reading.discard(event.index)
        self._times.read(now, event, still=bool(self._reading))
        if self.state is ReceiverState.FENCING:
            if self._reading:
                return []
            self.state = ReceiverState.FAILED
            self.deadline = float("inf")
            return [FencePassed()]
        if event.error is not None:
            return self._fail(event.error, now)
        return [] if self._reading else self._go_on(now)

    def _tick(self, now: float) -> list[ReceiverAction]:
        if now < self.deadline:
            return []
        if self.state is ReceiverState.FENCING:
            self.deadline = now + self._config.read_timeout_s
            return [DropPeer()]
        if self._reading:
            error = DeadlineExceeded("a read of offered KV took too long")
            return [*self._fail(error, now), DropPeer()]
        waited = {
            ReceiverState.OPENING: "prefill to accept",
            ReceiverState.WAITING: "prefill's first offer",
        }.get(self.state, "room in the KV pool" if self._blocks is None else "prefill's next offer")
        return self._fail(DeadlineExceeded(f"decode waited too long for {waited}"), now)

    def _fail(self, error: BatonError, now: float) -> list[ReceiverAction]:
        fenced = not self._reading
        self.state = ReceiverState.FAILED if fenced else ReceiverState.FENCING
        self.deadline = float("inf") if fenced else now + self._config.read_timeout_s
        self._waiting.clear()
        abort = Send(Abort(self._open.attempt, error.code))
        return [abort, Fail(error, fenced)]


def _refusal(code: str, text: str) -> BatonError:
    """Return prefill's refusal as the error it names; Unavailable if we do not know the code."""
    cls = all_errors().get(code)
    if cls is None or not issubclass(cls, HandoverError | DeadlineExceeded | Draining):
        return Unavailable(f"prefill refused: {text} ({code})")
    return cls(text)
