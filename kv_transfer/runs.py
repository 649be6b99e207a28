"""Runs by the thousand: a table that is cheap to make, and becomes objects only if asked to."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from baton.kv_transfer.transport import Run

Ints = NDArray[np.int64]
Columns = tuple[Ints, Ints, Ints]
"""Local offsets, remote offsets and lengths of runs, each [runs], in bytes."""


class RunTable(Sequence[Run]):
    """Runs in three columns; a transport may loop over it, or take the columns as they are."""

    __slots__ = ("length", "local", "remote")

    def __init__(self, local: Ints, remote: Ints, length: Ints) -> None:
        self.local = local
        self.remote = remote
        self.length = length

    def __repr__(self) -> str:
        return f"RunTable({len(self)} runs, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes that the runs move."""
        return int(self.length.sum())

    def __len__(self) -> int:
        return self.local.size

    def __iter__(self) -> Iterator[Run]:
        return map(Run, self.local.tolist(), self.remote.tolist(), self.length.tolist())

    @overload
    def __getitem__(self, index: int) -> Run: ...

    @overload
    def __getitem__(self, index: slice) -> "RunTable": ...

    def __getitem__(self, index: int | slice) -> "Run | RunTable":
        local, remote, length = self.local[index], self.remote[index], self.length[index]
        if isinstance(index, slice):
            return RunTable(local, remote, length)
        return Run(int(local), int(remote), int(length))


def merge(local: Ints, remote: Ints, length: Ints) -> Columns:
    """Return runs by their local offsets, merged where one continues another on both sides.

    There are no fewer runs that do the same: those that can be merged are neighbours once sorted,
    as runs do not overlap on the local side.
    """
    if np.any(local[1:] < local[:-1]):
        order = np.argsort(local)
        local, remote, length = local[order], remote[order], length[order]
    ends = length[:-1]
    continues = (local[:-1] + ends == local[1:]) & (remote[:-1] + ends == remote[1:])
    if not continues.any():
        return local, remote, length
    first = np.flatnonzero(np.concatenate(([True], ~continues)))
    return local[first], remote[first], np.add.reduceat(length, first)
