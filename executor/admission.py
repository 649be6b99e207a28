"""Who is inside a worker, and whether more may enter: what a drain closes and waits for."""

import asyncio
import math
from collections.abc import Callable

from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    Draining,
    InstanceLost,
    InvalidRequest,
    Overloaded,
)

_LEAVE_S = 30.0
"""For what is ended at the deadline of a drain to give back what it holds."""


class Admission:
    """Counts what is open. `drain` is final; `fence` is so until `unfence`."""

    def __init__(self, owner: str, *, limit: int | None = None) -> None:
        """`owner` is who drains or is full, in messages; `limit` is how much may be open."""
        self.open = 0
        self.draining = False
        self.handed_over = 0
        """How much was open when a drain came to its deadline."""
        self._owner = owner
        self._limit = limit
        self._empty = asyncio.Event()
        self._empty.set()
        self._unfenced = asyncio.Event()
        self._unfenced.set()

    def __repr__(self) -> str:
        return f"Admission({self._owner}, open={self.open}, draining={self.draining})"

    @property
    def fenced(self) -> bool:
        """Whether its lease has ended: see executor/leased.py."""
        return not self._unfenced.is_set()

    def refusal(self) -> BatonError:
        """Return the error that sends a request elsewhere."""
        if self.fenced:
            return InstanceLost(f"{self._owner} is fenced: nobody has renewed its lease")
        return Draining(f"{self._owner} is about to leave")

    def enter(self) -> None:
        """Count one in; raises Draining, InstanceLost while it is fenced, or Overloaded."""
        self.expect_open()
        if self._limit is not None and self.open >= self._limit:
            raise Overloaded(f"{self.open} requests are open in {self._owner}")
        self.open += 1
        self._empty.clear()

    def expect_open(self) -> None:
        """Raise what `enter` would while it drains, or is fenced."""
        if self.draining or self.fenced:
            raise self.refusal()

    def leave(self) -> None:
        """Count one out; it holds nothing any more."""
        self.open -= 1
        assert self.open >= 0, self
        if not self.open:
            self._empty.set()

    async def drain(self, deadline_s: float, hand_over: Callable[[], int]) -> int:
        """Let nothing more in, and return once nothing is open.

        What is still open after `deadline_s` seconds is ended by `hand_over`, for others to take
        over; returns how much that was. A caller that is cancelled calls nothing off, and of
        several calls the earliest deadline counts. Raises InvalidRequest for a deadline that makes
        no sense, and DeadlineExceeded if something that was ended does not leave.
        """
        if not 0 <= deadline_s < math.inf:  # false for NaN too
            raise InvalidRequest("deadline_s", deadline_s, "a finite number of seconds, 0 or more")
        self.draining = True
        timer = asyncio.get_running_loop().call_later(deadline_s, self._end_open, hand_over)
        await self._until_empty(deadline_s + _LEAVE_S)
        timer.cancel()
        return self.handed_over

    async def fence(self, hand_over: Callable[[], int]) -> None:
        """Let nothing more in, end what is open, and return once all of it has left.

        Raises DeadlineExceeded if something that was ended does not leave; it stays fenced.
        """
        self._unfenced.clear()
        if self.open:
            hand_over()
        await self._until_empty(_LEAVE_S)

    def unfence(self) -> None:
        """Let in again."""
        self._unfenced.set()

    async def until_unfenced(self) -> None:
        """Wait until it is not fenced, for as long as the caller likes."""
        await self._unfenced.wait()

    async def _until_empty(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._empty.wait()
        except TimeoutError:
            text = (
                f"{self.open} are still open in {self._owner} {_LEAVE_S:g} s after they were ended"
            )
            raise DeadlineExceeded(text) from None

    def _end_open(self, hand_over: Callable[[], int]) -> None:
        if self.open:
            self.handed_over += hand_over()
