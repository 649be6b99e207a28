"""Which prefill instances failed to hand over a moment ago, as if they hung, left or were gone."""

from baton.core.clock import Clock
from baton.core.errors import (
    DeadlineExceeded,
    Draining,
    InstanceLost,
    PeerLost,
    RankLost,
    Unavailable,
)
from baton.router.load import InstanceKey

AVOIDED_S = 5.0
"""How long a failure counts: a hung instance costs each request that tries it a whole deadline,
and one that works again should not go without work for long."""

_GONE = {
    error.code
    for error in (PeerLost, Unavailable, InstanceLost, RankLost, Draining, DeadlineExceeded)
}


class RecentFailures:
    """The outcome of the last attempt on each instance, for as long as a failure counts."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: dict[InstanceKey, float] = {}

    def ended(self, key: InstanceKey, outcome: str) -> None:
        """Note how an attempt ended: `ok`, or the code of an error.

        Other errors say nothing of whether the instance is there.
        """
        if outcome == "ok":
            self._until.pop(key, None)
        elif outcome in _GONE:
            now = self._clock()
            self._until = {k: until for k, until in self._until.items() if until > now}
            self._until[key] = now + AVOIDED_S

    def failing(self) -> set[InstanceKey]:
        """Return those whose last attempt failed, less than AVOIDED_S seconds ago."""
        now = self._clock()
        return {key for key, until in self._until.items() if now < until}
