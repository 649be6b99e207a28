"""What the groups that stand on another group have in common."""

from collections.abc import Sequence

from torch import Tensor

from baton.parallel.group import Exchange, Group


class LayeredGroup:
    """A group that does what another does; a subclass does some of it otherwise."""

    def __init__(self, below: Group) -> None:
        self.below = below

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.below}>"

    @property
    def rank(self) -> int:
        """See Group."""
        return self.below.rank

    @property
    def size(self) -> int:
        """See Group."""
        return self.below.size

    def all_reduce_(self, x: Tensor) -> Tensor:
        """See Group."""
        return self.below.all_reduce_(x)

    def addends(self, x: Tensor) -> Sequence[Tensor]:
        """See Group."""
        return self.below.addends(x)

    def all_gather(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        return self.below.all_gather(x, rows)

    def reduce_scatter(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        return self.below.reduce_scatter(x, rows)

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See Group."""
        return self.start_all_to_all(x, sent, received).wait()

    def start_all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Exchange:
        """See Group."""
        return self.below.start_all_to_all(x, sent, received)

    def broadcast_(self, x: Tensor, source: int) -> Tensor:
        """See Group."""
        return self.below.broadcast_(x, source)

    def send(self, x: Tensor, to: int) -> None:
        """See Group."""
        self.below.send(x, to)

    def receive_(self, x: Tensor, source: int) -> Tensor:
        """See Group."""
        return self.below.receive_(x, source)
