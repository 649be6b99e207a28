"""What the prefix cache gained and lost, for a router that wants to know who has which prefix."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockStored:
    """A full block of a prefix can be found now."""

    hash: bytes
    """Of the whole prefix up to the block's end; see core/hashing.py."""
    parent: bytes
    """Of the prefix up to the block's start: the root of its tenant's chain for a first block."""


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """It cannot be found any more. Ends go before beginnings: no prefix has a hole."""

    hash: bytes
    parent: bytes


KVEvent = BlockStored | BlockRemoved


@dataclass(frozen=True, slots=True)
class KVEvents:
    """What was recorded since the last drain."""

    first: int
    """Number of the first event; the next batch goes on where this one ends."""
    complete: bool
    """The events are not changes but all that is in the cache now, parents first: forget the
    rest. So it is at the start, and after events were lost because nobody drained them."""
    events: tuple[KVEvent, ...]


class KVEventLog:
    """A bounded list of events; when it is full it is dropped, and a reader starts anew."""

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` events."""
        self._limit = limit
        self._events: list[KVEvent] = []
        self._first = 0
        self._lost = True

    def __repr__(self) -> str:
        return f"<KVEventLog {len(self._events)} events, lost={self._lost}>"

    def record(self, event: KVEvent) -> None:
        """Add an event. Costs nothing while the next reader starts anew anyway."""
        if self._lost:
            return
        self._events.append(event)
        if len(self._events) > self._limit:
            self._lost = True
            self._first += len(self._events)
            self._events.clear()

    def drain(self, contents: Callable[[], Iterable[KVEvent]]) -> KVEvents:
        """Return and forget what was recorded; `contents` tells the whole cache if need be."""
        complete, self._lost = self._lost, False
        events = tuple(contents() if complete else self._events)
        batch = KVEvents(self._first, complete, events)
        self._first += len(events)
        self._events.clear()
        return batch
