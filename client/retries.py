"""Which failed requests are sent again, when, and how often at most over all requests."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.clock import Clock
from baton.core.errors import BatonError, DeadlineExceeded, InvalidConfig, Overloaded

_GROWTH = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When to send a request again: what failed before its first chunk, and may work next time."""

    attempts: int = 3
    """How often a request is sent at most; 1: never again."""
    backoff_s: float = 0.2
    """At most so long before the second attempt, and twice as long before each that follows; the
    server may ask for longer."""
    max_backoff_s: float = 10.0
    """If the server asks for longer, the request is not sent again."""
    budget: float = 10.0
    """Tokens of a bucket over all requests: a failure takes one, a success gives `refill` back, and
    nothing is sent again while half or less is left: no storm on a server that is in trouble."""
    refill: float = 0.1
    """See `budget`."""
    resumes: bool = False
    """Send each request with an idempotency key, so that an answer that broke off goes on where it
    broke. The server then keeps a request for ten seconds after its client is gone, unless the
    client ends it itself, as it does when a stream is closed."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidConfig("attempts", self.attempts, "1 or more")
        for name in ("backoff_s", "max_backoff_s", "budget", "refill"):
            if not getattr(self, name) >= 0:
                raise InvalidConfig(name, getattr(self, name), "0 or more")


NEVER = Retry(attempts=1)
"""Tell every failure."""


class RetryBudget:
    """The token bucket of gRPC's proposal A6 (retry throttling); for any thread."""

    def __init__(self, retry: Retry) -> None:
        self._most = retry.budget
        self._refill = retry.refill
        self._tokens = retry.budget
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"RetryBudget({self._tokens:g} of {self._most:g})"

    def succeeded(self) -> None:
        """Give back a part of a token."""
        with self._lock:
            self._tokens = min(self._most, self._tokens + self._refill)

    def failed(self) -> bool:
        """Take a token; return whether the request may be sent again."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1)
            return self._tokens > self._most / 2


class Attempts:
    """The attempts of one request, until its deadline."""

    def __init__(
        self,
        retry: Retry,
        budget: RetryBudget,
        clock: Clock,
        timeout_s: float,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`timeout_s` is for all attempts together; `draw` gives numbers from 0 to 1."""
        self._retry = retry
        self._budget = budget
        self._clock = clock
        self._deadline = clock() + timeout_s
        self._draw = draw
        self._failed = 0

    def seconds_left(self) -> float:
        """Return what is left for the next attempt."""
        return max(0.0, self._deadline - self._clock())

    def succeeded(self) -> None:
        """Note that the request ended as it should."""
        self._budget.succeeded()

    def pause_after(self, error: BatonError, *, began: bool) -> float | None:
        """Return for how many seconds to wait before the next attempt; None: there is none.

        `began`: something of the answer came; a second one would begin anew, without a key.
        """
        if not error.retryable or isinstance(error, DeadlineExceeded):
            return None
        self._failed += 1
        over = began and not self._retry.resumes
        if not self._budget.failed() or over or self._failed >= self._retry.attempts:
            return None
        pause_s = self._pause_s(error)
        if pause_s > self._retry.max_backoff_s or pause_s >= self.seconds_left():
            return None
        return pause_s

    def _pause_s(self, error: BatonError) -> float:
        grown = self._retry.backoff_s * _GROWTH ** (self._failed - 1)
        pause_s = self._draw() * min(grown, self._retry.max_backoff_s)
        if isinstance(error, Overloaded):
            return error.retry_after_s + pause_s  # not all at the same moment
        return pause_s

    def __repr__(self) -> str:
        return f"Attempts({self._failed} of {self._retry.attempts} failed)"
