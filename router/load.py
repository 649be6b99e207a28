"""What this gateway has open on each instance, and how fast its requests end."""

from collections import deque
from dataclasses import dataclass

from baton.core.clock import Clock
from baton.core.ids import Incarnation, InstanceId
from baton.core.topology import InstanceInfo

InstanceKey = tuple[InstanceId, Incarnation]
"""A restarted instance is another one: it holds nothing of what the old one held."""


def key_of(instance: InstanceInfo) -> InstanceKey:
    """Return the key under which an instance's load is kept."""
    return instance.instance_id, instance.incarnation


@dataclass(frozen=True, slots=True)
class Load:
    """Open work of one kind on one instance."""

    requests: int = 0
    tokens: int = 0
    """Decode: tokens of KV that the requests hold. Prefill: prompt tokens not yet computed."""

    def plus(self, requests: int, tokens: int) -> "Load":
        """Return the sum, which is never negative."""
        total = Load(self.requests + requests, self.tokens + tokens)
        assert total.requests >= 0, self
        assert total.tokens >= 0, self
        return total


class LoadTable:
    """Open work per instance; an instance without any has no row, so that nothing piles up."""

    def __init__(self) -> None:
        self._rows: dict[InstanceKey, Load] = {}

    def add(self, key: InstanceKey, *, requests: int = 0, tokens: int = 0) -> None:
        """Change a row by a difference, which may be negative."""
        load = self._rows.get(key, Load()).plus(requests, tokens)
        if load.requests:
            self._rows[key] = load
        else:
            assert load.tokens == 0, f"{key} has tokens but no requests: {load}"
            self._rows.pop(key, None)

    def of(self, instance: InstanceInfo) -> Load:
        """Return an instance's row."""
        return self._rows.get(key_of(instance), Load())

    def rows(self) -> dict[InstanceKey, Load]:
        """Return a copy of all rows."""
        return dict(self._rows)


class CompletionRate:
    """Estimates from recent completions when a place will be free."""

    def __init__(self, clock: Clock, *, remembered: int = 64) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=remembered)

    def completed(self) -> None:
        """Note that a request has ended now."""
        self._ends.append(self._clock())

    def seconds_to_next(self) -> float:
        """Return the mean gap between recent completions, from 1 to 60 seconds.

        The gap runs up to now, so that it grows while nothing completes.
        """
        if len(self._ends) < 2:
            return 1.0
        gap = (self._clock() - self._ends[0]) / (len(self._ends) - 1)
        return min(max(gap, 1.0), 60.0)
