"""Time, passed in wherever it matters, so that tests hold the hands."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only go forward."""

    def __call__(self) -> float: ...


monotonic: Clock = time.monotonic


class ManualClock:
    """A clock for tests: it moves only when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`."""
        assert seconds >= 0
        self.now += seconds
