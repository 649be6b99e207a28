"""What was decided and what happened, the latest of it, each with its reason."""

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass

from baton.core.log import get_logger

_KEPT = 1000

_log = get_logger("control")


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the journal."""

    number: int
    """From 1, without gaps, by one controller."""
    at: float
    """Unix time."""
    what: str
    """start, ready, lost, drain, flip, stop, gone, adopt, told, autoscale or trouble."""
    whom: str
    """An instance, a gateway or a pool."""
    reason: str


class Journal:
    """Keeps the last events; one event loop only."""

    def __init__(self, *, logged: bool) -> None:
        """`logged`: each goes to this process's log too."""
        self._logged = logged
        self._changed = asyncio.Event()
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self._last = 0
        self.counts: Counter[str] = Counter()
        """Of all events, by what happened."""

    @property
    def last(self) -> int:
        """The number of the latest event; 0 before the first."""
        return self._last

    def add(self, what: str, whom: str, reason: str) -> None:
        """Write one down."""
        self._last += 1
        self.counts[what] += 1
        self._events.append(Event(self._last, time.time(), what, whom, reason))
        self._changed.set()
        self._changed = asyncio.Event()
        if self._logged:
            _log.info(what, whom=whom, reason=reason)

    def after(self, number: int) -> tuple[Event, ...]:
        """Return those that came after the event of that number and are still kept."""
        return tuple(event for event in self._events if event.number > number)

    async def newer_than(self, number: int) -> tuple[Event, ...]:
        """Wait until something came after the event of that number, and return it.

        A number that is not reached yet is that of another controller: all of this one is newer.
        """
        if number > self._last:
            number = 0
        while self._last <= number:
            await self._changed.wait()
        return self.after(number)
