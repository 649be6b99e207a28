"""What ranks do together: one interface, whatever carries it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """An all-to-all that is under way."""

    def wait(self) -> Tensor:
        """Return the rows received, rank by rank; once. Until then x may not be changed."""
        ...


class Group(Protocol):
    """The ranks along one line of the mesh; every one of them makes the same calls in one order.

    Tensors are contiguous and on the instance's device. A call that a peer does not join within
    the group's deadline raises RankLost, on every rank that waits.
    """

    @property
    def rank(self) -> int:
        """The own place in the group, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Replace x by the sum over all ranks, in place, and return it; the same bits on each."""
        ...

    def addends(self, x: Tensor) -> Sequence[Tensor]:
        """Return tensors like x whose sum, in order, is that of all ranks' x; uses x up.

        They are the same on each rank, and may be memory of other ranks: they are valid until the
        next call. Who adds something to the sum anyway reads them as they lie.
        """
        ...

    def all_gather(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return all ranks' x one below the other, along dim 0; `rows` if they are not as many."""
        ...

    def reduce_scatter(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Return this rank's rows of the sum of x over all ranks; evenly, or by `rows`."""
        ...

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send `sent[i]` rows of x to rank i, in order; return the rows received, rank by rank."""
        ...

    def start_all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Exchange:
        """Begin an all-to-all, to compute meanwhile; the group's next call comes after `wait`."""
        ...

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """Fill x with that of rank `source` of the group, and return it."""
        ...

    def send(self, x: Tensor, to: int) -> None:
        """Send x to one rank; return once x may be changed."""
        ...

    def receive_(self, x: Tensor, source: int) -> Tensor:
        """Fill x, of the shape and type that is sent, and return it."""
        ...


@dataclass(frozen=True, slots=True)
class Arrived:
    """An exchange in which nothing has to come from elsewhere."""

    rows: Tensor

    def wait(self) -> Tensor:
        """See Exchange."""
        return self.rows


class SoloGroup:
    """A group of one, in which every collective is the identity."""

    rank = 0
    size = 1

    def __repr__(self) -> str:
        return "SoloGroup()"

    def all_reduce_(self, x: Tensor) -> Tensor:
        """See Group."""
        return x

    def addends(self, x: Tensor) -> Sequence[Tensor]:
        """See Group."""
        return (x,)

    def all_gather(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        return x

    def reduce_scatter(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        return x

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See Group."""
        return x

    def start_all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Exchange:
        """See Group."""
        return Arrived(x)

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """See Group."""
        return x

    def send(self, x: Tensor, to: int) -> None:
        """See Group; there is nobody else."""
        raise AssertionError("a group of one has nobody to send to")

    def receive_(self, x: Tensor, source: int) -> Tensor:
        """See Group; there is nobody else."""
        raise AssertionError("a group of one has nobody to receive from")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The groups that one rank belongs to, one per axis; by default it is alone."""

    pp: Group = field(default_factory=SoloGroup)
    dp: Group = field(default_factory=SoloGroup)
    ep: Group = field(default_factory=SoloGroup)
    cp: Group = field(default_factory=SoloGroup)
    tp: Group = field(default_factory=SoloGroup)

    @property
    def places(self) -> int:
        """Over how many places the sequences are spread: those along dp and ep."""
        return self.dp.size * self.ep.size

    @property
    def place(self) -> int:
        """Which of these places this rank is at."""
        return self.dp.rank * self.ep.size + self.ep.rank


def even_rows(x: Tensor, ranks: int) -> list[int]:
    """Return the rows of x that each rank has if they are as many on all."""
    own, over = divmod(x.shape[0], ranks)
    assert not over, f"{x.shape[0]} rows over {ranks} ranks"
    return [own] * ranks
