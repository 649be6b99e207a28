"""How fast a queue is served, measured while there is one."""

import math

from baton.core.clock import Clock

_HALF_LIFE_S = 10.0
"""Of waiting: what was measured longer ago counts half."""
_ENOUGH = 4
"""Requests after which the rate is more than a guess."""


class DrainRate:
    """Tokens per second that leave the queue; time in which nobody waits does not count."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since: float | None = None
        """Up to then it has been counted; None: nobody waits."""
        self._tokens = 0.0
        self._seconds = 0.0
        self._requests = 0

    def __repr__(self) -> str:
        return f"DrainRate({self.tokens_per_s()})"

    def waits(self, somebody: bool) -> None:
        """Note whether somebody waits from now on."""
        self._count()
        self._since = self._clock() if somebody else None

    def took(self, tokens: int) -> None:
        """Note that a request has been started; it counts if somebody waited until now."""
        if self._since is None:
            return
        self._count()
        self._tokens += tokens
        self._requests += 1

    def tokens_per_s(self) -> float | None:
        """Return the rate, or None while too little was measured."""
        self._count()
        if self._requests < _ENOUGH or self._seconds <= 0:
            return None
        return self._tokens / self._seconds

    def _count(self) -> None:
        """Count the time since the last call, and let what was before fade."""
        if self._since is None:
            return
        now = self._clock()
        rate = math.log(2) / _HALF_LIFE_S
        fade = math.exp(-rate * (now - self._since))
        self._tokens *= fade
        self._seconds = self._seconds * fade + (1 - fade) / rate
        self._since = now
