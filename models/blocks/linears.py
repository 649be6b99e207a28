"""Matrices of which each rank of a tensor-parallel group has a part.

column-parallel   some of the outputs: what a rank gets is its own, and whole
row-parallel      some of the inputs: what ranks get is to be added up
"""

from collections.abc import Sequence

from baton.kernels.linear import Linear
from baton.models.weights import ALL, Checkpoint, Rows
from baton.parallel.group import Group
from baton.parallel.split import even


def column_parallel(
    checkpoint: Checkpoint, whole: str, parts: Sequence[Rows], *, width: int, bias: bool
) -> Linear:
    """Read the wanted rows of matrices [rows, width], by which all of them multiply at once.

    Some families keep them on disk as one, under the name `whole`.
    """
    return Linear(*checkpoint.take_fused(whole, parts, width=width, bias=bias))


def row_parallel(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], tp: Group, *, bias: bool
) -> Linear:
    """Read this rank's columns of a matrix of `shape` [rows, width]; its bias counts once."""
    rows, width = shape
    cut = (ALL, even(width, tp.rank, tp.size))
    weight = checkpoint.take(f"{name}.weight", rows, width, cut=cut)
    found = checkpoint.take(f"{name}.bias", rows) if bias else None
    return Linear(weight, found if tp.rank == 0 else None)
