"""What a group's collectives move and how long they take, by kind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from torch import Tensor

from baton.parallel.group import Exchange, Group
from baton.parallel.layered_group import LayeredGroup


@dataclass(slots=True)
class Moved:
    """The calls of one kind."""

    calls: int = 0
    bytes: int = 0
    """That had to cross the rank's link in the busier direction, at the least: an all-reduce of B
    bytes on n ranks counts 2 B (n - 1) / n, whichever way it went."""
    seconds: float = 0.0
    """In the calls, peers' delay included; on GPUs until the work was queued. Not in it is what is
    computed while an all-to-all is under way, nor adding up what is left to who asked for it."""


class Traffic:
    """All calls of one group, by kind; written by the rank's thread, read by any."""

    def __init__(self) -> None:
        self._kinds: dict[str, Moved] = {}

    def __repr__(self) -> str:
        return f"<Traffic {self._kinds}>"

    def stats(self) -> dict[str, Moved]:
        """Return copies of the counts, by the name of the Group's method."""
        return {kind: replace(moved) for kind, moved in self._kinds.copy().items()}

    def add(self, kind: str, moved_bytes: int, since: float) -> None:
        """Count a call that began at perf_counter() `since`."""
        moved = self._kinds.setdefault(kind, Moved())
        moved.calls += 1
        moved.bytes += moved_bytes
        moved.seconds += perf_counter() - since


class CountedGroup(LayeredGroup):
    """See Group; counts every call."""

    def __init__(self, below: Group, traffic: Traffic) -> None:
        super().__init__(below)
        self.traffic = traffic

    def all_reduce_(self, x: Tensor) -> Tensor:
        """See Group."""
        since = perf_counter()
        self.below.all_reduce_(x)
        self.traffic.add("all_reduce", 2 * x.nbytes * (self.size - 1) // self.size, since)
        return x

    def addends(self, x: Tensor) -> Sequence[Tensor]:
        """See Group; counted as the all-reduce that it begins."""
        since = perf_counter()
        found = self.below.addends(x)
        self.traffic.add("all_reduce", 2 * x.nbytes * (self.size - 1) // self.size, since)
        return found

    def all_gather(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        since = perf_counter()
        gathered = self.below.all_gather(x, rows)
        self.traffic.add("all_gather", gathered.nbytes - x.nbytes, since)
        return gathered

    def reduce_scatter(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        since = perf_counter()
        own = self.below.reduce_scatter(x, rows)
        self.traffic.add("reduce_scatter", x.nbytes - own.nbytes, since)
        return own

    def start_all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Exchange:
        """See Group."""
        since = perf_counter()
        below = self.below.start_all_to_all(x, sent, received)
        rows = max(sum(sent) - sent[self.rank], sum(received) - received[self.rank])
        row_bytes = math.prod(x.shape[1:]) * x.itemsize
        return _CountedExchange(below, self.traffic, rows * row_bytes, perf_counter() - since)

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """See Group."""
        since = perf_counter()
        self.below.broadcast_(x, source)
        self.traffic.add("broadcast", x.nbytes, since)
        return x

    def send(self, x: Tensor, to: int) -> None:
        """See Group."""
        since = perf_counter()
        self.below.send(x, to)
        self.traffic.add("send", x.nbytes, since)

    def receive_(self, x: Tensor, source: int) -> Tensor:
        """See Group."""
        since = perf_counter()
        self.below.receive_(x, source)
        self.traffic.add("receive", x.nbytes, since)
        return x


@dataclass(frozen=True, slots=True)
class _CountedExchange:
    """Is counted when it has ended."""

    below: Exchange
    traffic: Traffic
    moved_bytes: int
    seconds: float
    """That starting it took."""

    def wait(self) -> Tensor:
        """See Exchange."""
        since = perf_counter()
        rows = self.below.wait()
        self.traffic.add("all_to_all", self.moved_bytes, since - self.seconds)
        return rows
