"""When things happened in one handover, and what that makes of the time."""

from collections.abc import Sequence
from dataclasses import replace

from baton.core.handover import FirstToken, Offer
from baton.core.spans import HandoverWait
from baton.core.trace import PARTS_TOLD, HandoverTrace, OfferTrace, RankTrace
from baton.kv_transfer.receiver_events import ReadEnded


class Timeline:
    """Collects instants (seconds on one clock) and adds them up at the end.

    open   accepted      offer 0        offer 1      last offer
     ├─────────┼─────────────┼──────────────┼─────────────┼──────────▶ time
                             │wait│███ read 0 ███│██ read 1 ██│█ read 2 █│
                             └room┘              └ hidden ────┘└ exposed ┘
    """

    def __init__(self) -> None:
        self._opened = self._handshake = 0.0
        self._granted = self._connected = self._landed = 0.0
        self._first_offer: float | None = None
        self._last_offer: float | None = None
        self._active_since: float | None = None
        self.reading_since = float("inf")
        """When the reads that are under way began; infinite if none are."""
        self._room = self._transfer = self._exposed = 0.0
        self._blocks = self._saved = self._bytes = 0
        self._transport = ""
        self._offers: dict[int, OfferTrace] = {}
        """The first few, by their index."""
        self._began: dict[int, float] = {}
        """When the reads that are under way began, by the index of their offer."""
        self._ranks: dict[int, RankTrace] = {}

    def opened(self, now: float) -> None:
        """Open was sent."""
        self._opened = now

    def accepted(self, now: float) -> None:
        """Accepted came."""
        self._handshake = now - self._opened

    def offered(self, now: float, offer: Offer, blocks: int) -> None:
        """An offer came, after which `blocks` more have been offered whole."""
        self._blocks += blocks
        if offer.index < PARTS_TOLD:
            self._offers[offer.index] = OfferTrace(
                offer.layers.start,
                offer.layers.end,
                offer.first_block,
                len(offer.blocks),
                now - self._opened,
            )
        if self._first_offer is None:
            self._first_offer = now
        if offer.first is not None:
            self._settle(now)
            self._last_offer = now

    def granted(self, now: float, cached: int) -> None:
        """Decode's pool had room, and its prefix cache the first `cached` blocks."""
        self._saved = cached
        self._granted = now
        if self._first_offer is not None:
            self._room = now - self._first_offer

    def connected(self, now: float) -> None:
        """The transport is connected."""
        self._connected = now

    def landed(self, now: float) -> None:
        """Everything has been read and verified."""
        self._landed = now

    def reading(self, now: float, offers: Sequence[int]) -> None:
        """Reads of offers with these indices were posted: at least one."""
        self._began.update(dict.fromkeys(offers, now))
        if self._active_since is None:
            self._active_since = self.reading_since = now

    def read(self, now: float, ended: ReadEnded, *, still: bool) -> None:
        """A read ended; `still` says whether others are under way."""
        self._settle(now)
        self._bytes += ended.bytes
        if ended.transport:
            self._transport = ended.transport
        self._book(now, ended)
        if not still:
            self._active_since = None
            self.reading_since = float("inf")

    def _book(self, now: float, ended: ReadEnded) -> None:
        """Note when an offer was read, and what each rank did of it."""
        began_s = self._began.pop(ended.index) - self._opened
        told = self._offers.get(ended.index)
        if told is not None and ended.error is None:
            self._offers[ended.index] = replace(
                told, read_s=began_s, done_s=now - self._opened, bytes=ended.bytes
            )
        for rank, part in enumerate(ended.ranks):
            if part.bytes:
                before = self._ranks.get(rank) or RankTrace(rank, begin_s=began_s)
                self._ranks[rank] = RankTrace(
                    rank,
                    before.bytes + part.bytes,
                    min(before.begin_s, began_s),
                    max(before.end_s, began_s + part.seconds),
                    before.busy_s + part.seconds,
                )

    def _settle(self, now: float) -> None:
        """Book the time since reads became active, as hidden or as exposed."""
        if self._active_since is None:
            return
        self._transfer += now - self._active_since
        if self._last_offer is not None:
            self._exposed += now - self._active_since
        self._active_since = now

    def wait(self, began: float, first: FirstToken) -> HandoverWait:
        """Return how a handover that landed was waited for since its attempt began."""
        assert self._last_offer is not None, "landed without a last offer"
        room = max(self._last_offer, self._granted)
        connected = max(room, self._connected)
        return HandoverWait(
            before_open_s=self._opened - began,
            handshake_s=self._handshake,
            offered_s=self._last_offer - self._opened,
            room_s=room - self._last_offer,
            connect_s=connected - room,
            transfer_s=self._landed - connected,
            queue_s=first.queue_s,
            compute_s=first.compute_s,
            offer_s=first.offer_s,
        )

    def trace(
        self, prefill_instance: str, attempt: int, outcome: str, first: FirstToken | None
    ) -> HandoverTrace:
        """Return the sums; what prefill measured itself came with the first token."""
        return HandoverTrace(
            prefill_instance=prefill_instance,
            attempt=attempt,
            outcome=outcome,
            handshake_s=self._handshake,
            queue_s=first.queue_s if first else 0.0,
            compute_s=first.compute_s if first else 0.0,
            allocation_wait_s=self._room,
            transfer_s=self._transfer,
            exposed_s=self._exposed,
            chunks=first.chunks if first else 0,
            cached_tokens=first.cached_tokens if first else 0,
            blocks=self._blocks,
            blocks_saved=min(self._saved, self._blocks),
            bytes=self._bytes,
            transport=self._transport,
            offered_s=0.0 if self._last_offer is None else self._last_offer - self._opened,
            chunk_s=first.chunk_s if first else (),
            offers=tuple(self._offers.values()),
            ranks=tuple(trace for _, trace in sorted(self._ranks.items())),
        )
