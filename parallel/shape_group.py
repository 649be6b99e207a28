"""A place in a group whose other ranks are not there: collectives give shapes, and move nothing."""

from collections.abc import Sequence

from torch import Tensor

from baton.parallel.group import SoloGroup


class ShapeGroup(SoloGroup):
    """Implements `Group` for tensors on torch's `meta` device; what is sent is nowhere."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __repr__(self) -> str:
        return f"ShapeGroup({self.rank} of {self.size})"

    def all_gather(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        total = self.size * x.shape[0] if rows is None else sum(rows)
        return x.new_empty(total, *x.shape[1:])

    def reduce_scatter(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        own = x.shape[0] // self.size if rows is None else rows[self.rank]
        return x.new_empty(own, *x.shape[1:])
