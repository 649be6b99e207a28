"""Where the rows of a step's stream are within a tensor-parallel group, and how sums end there.

Between two matrices that are split over ranks lies work that is not: norms and residual additions.
Either every rank does it for all tokens, or each for some of them (sequence parallelism,
Korthikanti et al., 2022). Both move the same bytes, since an all-reduce is a reduce-scatter and an
all-gather:

    matrix ── all-reduce ──────────────────── norm of all tokens ──────── matrix
    matrix ── reduce-scatter ── norm of the own tokens ── all-gather ──── matrix
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from baton.parallel.group import Group
from baton.parallel.split import sizes


class AddNorm(Protocol):
    """What follows a sum."""

    def add_(self, addends: Sequence[Tensor], stream: Tensor) -> Tensor:
        """Add the sum of the addends to the stream in place; return the norm of that."""
        ...


class TokenRows(Protocol):
    """The rows of the stream that this rank has in a step."""

    @property
    def count(self) -> int:
        """How many rows of the stream this rank has."""
        ...

    def gather(self, own: Tensor) -> Tensor:
        """Return all tokens' rows of what every rank has of the stream."""
        ...

    def reduce(self, partial: Tensor) -> Tensor:
        """Return this rank's rows of the sum of all ranks' partial [tokens, n]; uses it up."""
        ...

    def add_norm_(self, partial: Tensor, stream: Tensor, norm: AddNorm) -> Tensor:
        """Add `reduce` to this rank's rows of the stream, in place; return the norm of those.

        One call, so that the sum need not be written where the addition and the norm follow.
        """
        ...


class AllRows:
    """Every rank has the rows of all tokens."""

    def __init__(self, tp: Group, tokens: int) -> None:
        self.count = tokens
        self._tp = tp

    def __repr__(self) -> str:
        return f"AllRows({self.count})"

    def gather(self, own: Tensor) -> Tensor:
        """See TokenRows: it is all there."""
        return own

    def reduce(self, partial: Tensor) -> Tensor:
        """See TokenRows."""
        return self._tp.all_reduce_(partial)

    def add_norm_(self, partial: Tensor, stream: Tensor, norm: AddNorm) -> Tensor:
        """See TokenRows."""
        return norm.add_(self._tp.addends(partial), stream)


class OwnRows:
    """Each rank has the rows of some tokens, as many as any other or one more or less."""

    def __init__(self, tp: Group, tokens: int) -> None:
        self._tp = tp
        self._rows = sizes(tokens, tp.size)
        self.count = self._rows[tp.rank]

    def __repr__(self) -> str:
        return f"OwnRows({self.count} of {sum(self._rows)})"

    def gather(self, own: Tensor) -> Tensor:
        """See TokenRows."""
        return self._tp.all_gather(own.contiguous(), self._rows)

    def reduce(self, partial: Tensor) -> Tensor:
        """See TokenRows."""
        return self._tp.reduce_scatter(partial, self._rows)

    def add_norm_(self, partial: Tensor, stream: Tensor, norm: AddNorm) -> Tensor:
        """See TokenRows."""
        return norm.add_((self.reduce(partial),), stream)


def token_rows(tp: Group, tokens: int, scatter_from: int) -> TokenRows:
    """Return who has which rows: `scatter_from` tokens and more are spread over the ranks."""
    if tp.size > 1 and tokens >= max(scatter_from, tp.size):
        return OwnRows(tp, tokens)
    return AllRows(tp, tokens)
