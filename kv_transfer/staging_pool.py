"""Whose the pages of staging memory are: equal pieces of host memory that KV passes through.

Whoever claims pages gets all that it asked for or waits, in order of arrival, so that two that
have half of what they need can never block each other. Pages are given back by the claim. A page
has an epoch, which rises when it is given back: references to what lay in it are then stale.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.errors import Unavailable
from baton.core.handover import BlockRef
from baton.core.ids import BlockId, Epoch

Granted = Callable[[tuple[BlockRef, ...]], None]


@dataclass(eq=False, slots=True)
class Claim:
    """Pages that somebody has, or waits for."""

    count: int
    granted: Granted
    pages: tuple[BlockRef, ...] = ()
    """Empty while it waits."""


@dataclass(frozen=True, slots=True)
class StagingStats:
    """Pages at one moment."""

    total: int
    free: int
    waiting: int
    """Claims that wait for pages."""


class StagingPool:
    """The books of `num_pages` pages; no memory, no clock, no I/O."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0
        self._epochs = [0] * num_pages
        self._free = list(range(num_pages))
        self._waiting: deque[Claim] = deque()
        self._held: set[Claim] = set()

    def __repr__(self) -> str:
        return f"<StagingPool {self.stats()}>"

    def claim(self, count: int, granted: Granted) -> Claim:
        """Ask for `count` pages; `granted` is called with them once they are there, perhaps now.

        Whoever claims bounds its own claims, and their waits. Raises Unavailable if there are
        not so many pages at all.
        """
        assert count > 0
        if count > len(self._epochs):
            raise Unavailable(
                f"{count} pages of staging memory are needed, and there are {len(self._epochs)}"
            )
        claim = Claim(count, granted)
        self._waiting.append(claim)
        self._grant()
        return claim

    def give_back(self, claim: Claim) -> None:
        """End a claim, whether it has its pages or still waits; safe to repeat."""
        if claim in self._held:
            self._held.discard(claim)
            for page in claim.pages:
                self._epochs[page.block] += 1
            self._free = sorted((*self._free, *(page.block for page in claim.pages)))
        elif claim in self._waiting:
            self._waiting.remove(claim)
        self._grant()

    def stats(self) -> StagingStats:
        """Return a snapshot."""
        return StagingStats(len(self._epochs), len(self._free), len(self._waiting))

    def check(self, *, idle: bool = False) -> None:
        """Assert that every page is free or held once and, if `idle`, that all are free."""
        held = [page.block for claim in self._held for page in claim.pages]
        assert sorted((*held, *self._free)) == list(range(len(self._epochs))), self
        assert not idle or not (held or self._waiting), f"staging leaked: {self}"

    def _grant(self) -> None:
        while self._waiting and self._waiting[0].count <= len(self._free):
            claim = self._waiting.popleft()
            # The lowest ones: neighbours, more often than not, which one copy can fill.
            taken, self._free = self._free[: claim.count], self._free[claim.count :]
            claim.pages = tuple(BlockRef(BlockId(n), Epoch(self._epochs[n])) for n in taken)
            self._held.add(claim)
            claim.granted(claim.pages)
