"""An instance's side of its events: what its caches gained and lost, and its load, for gateways.

    engine ──events──▶ history, bounded ──▶ follower 1 (gateway)
                             └────────────▶ follower 2 …

A follower is told all that is in the caches first, and then what changes. One that reads so slowly
that what it has not seen yet is no longer in the history is told everything anew. Nothing is kept
for a follower but a number, and while there is none nothing is done at all.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Protocol

from baton.core.ids import Incarnation
from baton.core.instance_events import KEY_BYTES, BlockChanges, CacheTerms, InstanceLoad
from baton.engine.kv_events import BlockStored, KVEvents

_HISTORY = 1 << 16
"""Events that are kept at most."""
_PORTION = 1 << 12
"""Events, or blocks, in one message at most."""
_PACE_S = 0.02
"""Between two messages at least: a busy engine makes many events."""
HEARTBEAT_S = 1.0
"""Between two messages at most."""

Told = tuple[InstanceLoad, Sequence[BlockChanges]]


class Engine(Protocol):
    """What is told of."""

    moved: asyncio.Event
    """Set whenever something may have changed."""

    def drain_kv_events(self) -> tuple[KVEvents, ...]:
        """Return what each partition's cache gained and lost since the last call."""
        ...

    def cached_hashes(self) -> tuple[Iterable[bytes], ...]:
        """Return what is in each partition's cache now."""
        ...

    def load(self) -> InstanceLoad:
        """Return what there is to do."""
        ...


class EventFeed:
    """Run `run` as a task; each follower iterates over a `follow` of its own."""

    def __init__(self, incarnation: Incarnation, terms: CacheTerms, engine: Engine) -> None:
        self.incarnation = incarnation
        self.terms = terms
        self._engine = engine
        self._history: deque[BlockChanges] = deque()
        self._kept = 0
        """Events in the history."""
        self._end = 0
        """Changes that there have been; the oldest in the history has number `_begin`."""
        self._next_event: list[int] = []
        """By partition."""
        self._followers = 0
        self._told = asyncio.Event()
        self._closed = False

    def __repr__(self) -> str:
        return f"<EventFeed to {self._followers}, {self._kept} events kept>"

    @property
    def _begin(self) -> int:
        return self._end - len(self._history)

    async def run(self) -> None:
        """Tell followers what is new, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._engine.moved.wait()
            self._engine.moved.clear()
            if self._followers:
                self._gather()
                self._tell()
            await asyncio.sleep(_PACE_S)

    def close(self) -> None:
        """End every follower's stream."""
        self._closed = True
        self._tell()

    async def follow(self) -> AsyncIterator[Told]:
        """Tell everything from the beginning, then what is new, until the instance closes."""
        self._followers += 1
        try:
            seen = -1
            while not self._closed:
                if seen < self._begin:
                    self._gather()
                    seen = self._end
                    portions = self._everything()
                    yield self._engine.load(), portions[:1]
                    for portion in portions[1:]:
                        yield self._engine.load(), (portion,)
                else:
                    news = self._news(seen)
                    seen += len(news)
                    yield self._engine.load(), news
                if seen == self._end and not self._closed:
                    await self._told.wait()
        finally:
            self._followers -= 1

    def _tell(self) -> None:
        self._told.set()
        self._told = asyncio.Event()

    def _news(self, seen: int) -> list[BlockChanges]:
        """Return the changes from number `seen` on: one message full, at least one change."""
        news: list[BlockChanges] = []
        events = 0
        for number in range(seen - self._begin, len(self._history)):
            change = self._history[number]
            events += change.events
            if news and events > _PORTION:
                break
            news.append(change)
        return news

    def _gather(self) -> None:
        """Put what the engine has recorded into the history."""
        if not self.terms.hash_name:
            return
        drained = self._engine.drain_kv_events()
        self._next_event = [batch.first + len(batch.events) for batch in drained]
        if any(batch.complete for batch in drained):  # events were lost: all begin anew
            self._end += 1
            self._history.clear()
            self._kept = 0
            return
        for partition, batch in enumerate(drained):
            for start in range(0, len(batch.events), _PORTION):
                self._keep(_net(partition, batch, start))

    def _keep(self, change: BlockChanges) -> None:
        self._history.append(change)
        self._end += 1
        self._kept += change.events
        while self._kept > _HISTORY:
            self._kept -= self._history.popleft().events

    def _everything(self) -> list[BlockChanges]:
        """Return what is in the caches, in portions; the first of each partition begins anew."""
        portions: list[BlockChanges] = []
        if not self.terms.hash_name:
            return portions
        for partition, hashes in enumerate(self._engine.cached_hashes()):
            keys = b"".join(value[:KEY_BYTES] for value in hashes)
            first, size = self._next_event[partition], _PORTION * KEY_BYTES
            for start in range(0, max(1, len(keys)), size):
                stored = keys[start : start + size]
                portions.append(BlockChanges(partition, first, 0, start == 0, stored, b""))
        return portions


def _net(partition: int, batch: KVEvents, start: int) -> BlockChanges:
    """Sum up a portion of a batch: of each block, only the last event counts."""
    events = batch.events[start : start + _PORTION]
    last = {event.hash[:KEY_BYTES]: isinstance(event, BlockStored) for event in events}
    stored = b"".join(key for key, there in last.items() if there)
    removed = b"".join(key for key, there in last.items() if not there)
    return BlockChanges(partition, batch.first + start, len(events), False, stored, removed)
