"""Prefill's side of one attempt of one handover: event in, list of actions out.

    NEW ──Opened──▶ QUEUED ─────Started────▶ COMPUTING ──Sampled──▶ OFFERED ──Received──▶ ENDED
     │                ▲ └──────────── StreamEnded, Abort, Failed, Tick ─────────────────────▶┘
     └──▶ PULLING ────┘ reads first what decode has of the prompt, if that is cheaper

No clock but the one passed in, no I/O. Whatever ends it, the machine emits Release exactly once
if a sequence was submitted, and End exactly once; after that every event is ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from baton.core.config import HandoverConfig
from baton.core.errors import BatonError, DeadlineExceeded, HandoverError, Incompatible
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
    Want,
)
from baton.core.ids import Attempt
from baton.core.kv_layout import LayerRange
from baton.core.request import TokenLogprobs
from baton.core.trace import PARTS_TOLD
from baton.kv_transfer.layer_groups import min_offer_bytes
from baton.kv_transfer.plan import TransferPlan, plan_between
from baton.kv_transfer.pull import blocks_to_pull
from baton.kv_transfer.sender_events import (
    ChunkReady,
    End,
    Failed,
    LayersReady,
    Opened,
    PeerSaid,
    Pull,
    PullEnded,
    Release,
    Sampled,
    Send,
    SenderAction,
    SenderEvent,
    SendOffer,
    Stage,
    Staged,
    Started,
    StreamEnded,
    Submit,
    Tick,
)


class SenderState(StrEnum):
    """Where the attempt stands."""

    NEW = "new"
    PULLING = "pulling"
    QUEUED = "queued"
    COMPUTING = "computing"
    OFFERED = "offered"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class DirectReads:
    """How others can read our blocks on devices where they are."""

    transports: tuple[bytes, ...]
    """As Accepted has them."""
    ways: tuple[str, ...]
    """See NegotiatedTransport.ways."""

    def reach(self, theirs: Sequence[str]) -> bool:
        """Return whether decode, which reads in these ways, can."""
        return not set(self.ways).isdisjoint(theirs)


class Sender:
    """One attempt, seen from prefill."""

    def __init__(
        self,
        *,
        compatibility: str,
        accepted: Accepted,
        config: HandoverConfig,
        now: float,
        staged: bool = False,
        direct: DirectReads | None = None,
    ) -> None:
        """`staged`: our blocks are copied to pages, which are offered, for whoever cannot read them
        where they are as `direct` says.
        """
        self.state = SenderState.NEW
        self.deadline = now + config.accept_timeout_s
        """When to send Tick, on the clock of `now`; infinite while the engine has the prompt."""
        self.unread_since = float("inf")
        """When the last offer was made, while it is not received."""
        self._compatibility = compatibility
        self._layout = accepted.layout.model
        self._plan: TransferPlan | None = None
        self._accepted = accepted
        self._config = config
        self.min_offer_bytes = 0.0
        """KV in an offer at least, where it is not the last of a chunk; known once opened."""
        self._open: Open | None = None
        self._wanted_blocks = range(0)
        self._attempt = Attempt(0)
        self._prompt_tokens = 0
        self._opened_at = self._started_at = self.sampled_at = now
        self._offers = 0
        self._offered_blocks = 0
        """With all their layers."""
        self._offered_layers = 0
        """Of the blocks of the chunk that is being computed."""
        self._chunks = 0
        self._chunk_s: list[float] = []
        """When each was computed, since the first step began."""
        self._cached_tokens = 0
        self._blocks: tuple[BlockRef, ...] = ()
        self._staged = staged
        self._direct = direct
        self._pages: tuple[BlockRef, ...] = ()
        """One for each block of the prompt, once there is room for all of them."""
        self._unstaged: list[SendOffer] = []
        """Offers that wait for that."""

    def __repr__(self) -> str:
        return f"Sender({self.state}, offers={self._offers}, blocks={self._offered_blocks})"

    @property
    def plan(self) -> TransferPlan:
        """How KV gets from here to decode; known once opened."""
        assert self._plan is not None, "not opened"
        return self._plan

    @property
    def direct(self) -> bool:
        """Whether decode reads our blocks where they are on a device; known once opened."""
        return self._accepted.direct

    def handle(self, event: SenderEvent, now: float) -> list[SenderAction]:
        """Take one event at time `now` (seconds) and return what to do, in order."""
        if self.state is SenderState.ENDED:
            return []
        match event:
            case Opened():
                return self._opened(event, now)
            case PullEnded():
                return self._pulled()
            case Started(cached_tokens, blocks):
                return self._started(cached_tokens, blocks, now)
            case Staged(pages):
                return self._have_pages(pages, now)
            case LayersReady(end, layers):
                return self._layers_ready(end, layers)
            case ChunkReady(end, blocks):
                return self._chunk_ready(end, blocks, now)
            case Sampled(token, logprobs):
                return self._sampled(token, logprobs, now)
            case PeerSaid(message):
                return self._peer_said(message)
            case StreamEnded():
                return self._end("cancelled")
            case Failed(error):
                return self._refuse(error)
            case Tick():
                return self._tick(now)

    def _opened(self, event: Opened, now: float) -> list[SenderAction]:
        message = event.message
        if self.state is not SenderState.NEW:
            return self._refuse(HandoverError("a handover stream was opened twice"))
        if message.compatibility != self._compatibility:
            return self._refuse(
                Incompatible(
                    f"decode runs {message.compatibility}, prefill {self._compatibility}: "
                    "model, revision, compute dtype, rotation and KV shape must be the same"
                )
            )
        try:
            self._plan = plan_between(self._accepted.layout, message.layout)
        except Incompatible as error:
            return self._refuse(error)
        self._accepted = self._way_of(message)
        self._open = message
        self._attempt = message.attempt
        self._prompt_tokens = len(message.request.prompt)
        self.min_offer_bytes = min_offer_bytes(self._config, message.bytes_per_s)
        self._opened_at = self._started_at = now
        wanted = self._worth_pulling(event)
        if not wanted:
            return [self._queue(message), Send(self._accepted)]
        self._wanted_blocks = wanted
        self.state = SenderState.PULLING
        self.deadline = now + self._config.read_timeout_s
        want = Want(self._attempt, wanted.start, wanted.stop)
        return [Send(self._accepted), Send(want)]

    def _way_of(self, message: Open) -> Accepted:
        """Return what to answer; blocks on a device are read where they are, if decode can."""
        direct = self._direct
        if direct is None or not self.plan.in_place or not direct.reach(message.device_ways):
            return self._accepted
        self._staged = False
        return replace(self._accepted, transports=direct.transports, direct=True)

    def _worth_pulling(self, event: Opened) -> range:
        message = event.message
        if self._staged or self._accepted.direct or message.layout.model != self._layout:
            return range(0)  # what is read must land as it is, block for block
        return blocks_to_pull(
            self._config,
            self._layout,
            here=event.cached_blocks,
            there=message.cached_blocks,
            bytes_per_s=message.bytes_per_s,
            token_s=event.token_s,
        )

    def _queue(self, message: Open) -> SenderAction:
        self.state = SenderState.QUEUED
        self.deadline = float("inf")
        return Submit(message)

    def _offered_to_us(self, offer: Offer) -> list[SenderAction]:
        """Decode offers what we wanted, or has nothing of it any more, or is too late."""
        if self._open is None or self.state is not SenderState.PULLING:
            return [Send(Pulled(self._attempt))]
        if not offer.blocks:
            return [Send(Pulled(self._attempt)), self._queue(self._open)]
        wanted = self._wanted_blocks
        whole = offer.layers == self._layout.all_layers and offer.first is None
        if offer.first_block != wanted.start or len(offer.blocks) > len(wanted) or not whole:
            return self._refuse(HandoverError("decode offers what prefill did not want"))
        self.deadline = float("inf")  # the read has deadlines of its own
        return [Pull(offer)]

    def _pulled(self) -> list[SenderAction]:
        assert self._open is not None, "a pull before Open"
        assert self.state is SenderState.PULLING, f"a pull in state {self.state}"
        return [Send(Pulled(self._attempt)), self._queue(self._open)]

    def _started(
        self, cached_tokens: int, blocks: tuple[BlockRef, ...], now: float
    ) -> list[SenderAction]:
        """Begin with the first chunk; what the cache had can be read while it is computed."""
        if self.state is not SenderState.QUEUED:
            return []
        self.state = SenderState.COMPUTING
        self._started_at = now
        self._cached_tokens = cached_tokens
        self._blocks = blocks
        offers = self._offer(self._complete_blocks(cached_tokens), self._layout.layers)
        if not self._staged:
            return offers
        self.deadline = now + self._config.room_timeout_s
        return [Stage(self._layout.blocks_for(self._prompt_tokens)), *offers]

    def _have_pages(self, pages: tuple[BlockRef, ...], now: float) -> list[SenderAction]:
        """Make the offers that waited for pages.

        All pages at once, as decode reserves all blocks at once: who has some of either never
        waits for more of it while holding what another waits for.
        """
        assert len(pages) == self._layout.blocks_for(self._prompt_tokens), "all or nothing"
        self._pages = pages
        self.deadline = float("inf")
        if self.state is SenderState.OFFERED:
            self._await_received(now)
        offers, self._unstaged = self._unstaged, []
        return [self._to_pages(offer) for offer in offers]

    def _to_pages(self, offer: SendOffer) -> SendOffer:
        end = offer.first_block + len(offer.blocks)
        return replace(offer, pages=self._pages[offer.first_block : end])

    def _await_received(self, now: float) -> None:
        self.deadline = now + self._config.received_timeout_s
        self.unread_since = now

    def _layers_ready(self, end: int, layers: int) -> list[SenderAction]:
        """Offer what the chunk has so far, if that is enough for a read of its own."""
        assert self.state is SenderState.COMPUTING, f"layers in state {self.state}"
        upto = self._complete_blocks(end)
        blocks = upto - self._offered_blocks
        pending = blocks * (layers - self._offered_layers) * self._layout.layer_bytes
        return self._offer(upto, layers) if pending >= self.min_offer_bytes else []

    def _complete_blocks(self, end: int) -> int:
        """Return the blocks that no later chunk writes, once the prompt is computed to `end`.

        Where decode's blocks are larger: those that fill blocks of decode's.
        """
        if end >= self._prompt_tokens:
            return self._layout.blocks_for(end)
        return end // self.plan.offer_tokens * self.plan.offer_tokens // self._layout.block_size

    def _chunk_ready(
        self, end: int, blocks: tuple[BlockRef, ...], now: float
    ) -> list[SenderAction]:
        assert self.state is SenderState.COMPUTING, f"a chunk in state {self.state}"
        self._chunks += 1
        if self._chunks <= PARTS_TOLD:
            self._chunk_s.append(now - self._started_at)
        self._blocks = blocks
        if end >= self._prompt_tokens:
            return []  # the last offer waits for the first token, which this same step sampled
        return self._offer(self._complete_blocks(end), self._layout.layers)

    def _sampled(
        self, token: int, logprobs: TokenLogprobs | None, now: float
    ) -> list[SenderAction]:
        assert self.state is SenderState.COMPUTING, f"a token in state {self.state}"
        self.state = SenderState.OFFERED
        self.sampled_at = now
        if self._pages or not self._staged:
            self._await_received(now)
        first = FirstToken(
            token=token,
            queue_s=self._started_at - self._opened_at,
            compute_s=now - self._started_at,
            chunks=self._chunks,
            cached_tokens=self._cached_tokens,
            logprobs=logprobs,
            chunk_s=tuple(self._chunk_s),
        )
        blocks = self._layout.blocks_for(self._prompt_tokens)
        return self._offer(blocks, self._layout.layers, first)

    def _offer(self, upto: int, layers: int, first: FirstToken | None = None) -> list[SenderAction]:
        """Offer the blocks up to `upto`, in the layers before `layers`, that were not offered yet.

        An empty offer is made only if it is the last.
        """
        begin, layer = self._offered_blocks, self._offered_layers
        if upto <= begin:
            if first is None:
                return []
            layer = 0
        offer = SendOffer(
            attempt=self._attempt,
            index=self._offers,
            layers=LayerRange(layer, layers),
            first_block=begin,
            blocks=self._blocks[begin:upto],
            first=first,
        )
        self._offers += 1
        self._offered_layers = layers
        if layers == self._layout.layers:
            self._offered_blocks, self._offered_layers = upto, 0
        if not self._staged:
            return [offer]
        if self._pages:
            return [self._to_pages(offer)]
        self._unstaged.append(offer)
        return []

    def _peer_said(self, message: Offer | Received | Abort) -> list[SenderAction]:
        if message.attempt != self._attempt:
            return []  # about an attempt that is not this stream's
        if isinstance(message, Offer):
            return self._offered_to_us(message)
        if isinstance(message, Abort):
            return self._end("cancelled")
        if self.state is not SenderState.OFFERED:
            return self._refuse(HandoverError("decode received a prompt that is not computed"))
        return self._end("ok")

    def _tick(self, now: float) -> list[SenderAction]:
        if now < self.deadline:
            return []
        if self.state is SenderState.PULLING:
            assert self._open is not None, "a pull before Open"
            return [self._queue(self._open)]  # decode says nothing: compute it
        if self.state is SenderState.NEW:
            what = "an Open"
        elif self._staged and not self._pages:
            what = "room in staging memory"
        else:
            what = "the offered KV to be read"
        return self._refuse(DeadlineExceeded(f"prefill waited too long for {what}"))

    def _refuse(self, error: BatonError) -> list[SenderAction]:
        return [Send(Refused(error.code, error.message)), *self._end(error.code)]

    def _end(self, outcome: str) -> list[SenderAction]:
        held = self.state is not SenderState.NEW
        self.state = SenderState.ENDED
        self.deadline = self.unread_since = float("inf")
        return [Release(), End(outcome)] if held else [End(outcome)]
