"""Runs by the thousand: a table that is cheap to make, and becomes objects only if asked to."""

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from baton.core.errors import TransportError
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

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "RunTable":
        """Return `runs` as a table; raises OverflowError if a number has more than 64 bits."""
        rows = [(run.local_offset, run.remote_offset, run.length) for run in runs]
        columns = np.array(rows, np.int64).reshape(-1, 3).T.copy()
        return cls(*columns)

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

    def where(self, wanted: NDArray[np.bool_]) -> "RunTable":
        """Return the runs of which `wanted` is true."""
        return RunTable(self.local[wanted], self.remote[wanted], self.length[wanted])

    def between(self, begin: int, end: int) -> "RunTable":
        """Return bytes `begin` to `end` of all that the runs move, in their order."""
        ends = np.cumsum(self.length)
        first, last = int(ends.searchsorted(begin, "right")), int(ends.searchsorted(end))
        local, remote, length = (
            column[first : last + 1].copy() for column in (self.local, self.remote, self.length)
        )
        before = begin - int(ends[first] - length[0])
        local[0] += before
        remote[0] += before
        length[0] -= before
        length[-1] -= max(int(ends[last]) - end, 0)
        return RunTable(local, remote, length)


def checked_runs(runs: Sequence[Run], local_length: int, remote_length: int) -> RunTable:
    """Return `runs` as a table, neighbours merged where one goes on where the other ends.

    Raises TransportError if a run leaves the local or the remote region.
    """
    try:
        table = runs if isinstance(runs, RunTable) else RunTable.of(runs)
    except OverflowError:
        bad = next(run for run in runs if not _fits(run))
        side = "remote" if 0 <= bad.local_offset <= local_length - bad.length else "local"
        raise TransportError(f"{bad} leaves the {side} region") from None
    local, remote, length = table.local, table.remote, table.length
    for side, offset, end in (("local", local, local_length), ("remote", remote, remote_length)):
        # Not `offset + length`, which may be more than 64 bits hold.
        outside = (length <= 0) | (offset < 0) | (offset > end - length)
        if outside.any():
            bad = table[int(outside.argmax())]
            raise TransportError(f"{bad} leaves the {side} region of {end} bytes")
    return RunTable(*_join(local, remote, length))


def merge(local: Ints, remote: Ints, length: Ints) -> Columns:
    """Return runs by their local offsets, merged where one continues another on both sides.

    There are no fewer runs that do the same: those that can be merged are neighbours once sorted,
    as runs do not overlap on the local side.
    """
    if np.any(local[1:] < local[:-1]):
        order = np.argsort(local)
        local, remote, length = local[order], remote[order], length[order]
    return _join(local, remote, length)


def _join(local: Ints, remote: Ints, length: Ints) -> Columns:
    """Merge each run that continues the one before it on both sides."""
    ends = length[:-1]
    continues = (local[:-1] + ends == local[1:]) & (remote[:-1] + ends == remote[1:])
    if not continues.any():
        return local, remote, length
    first = np.flatnonzero(np.concatenate(([True], ~continues)))
    return local[first], remote[first], np.add.reduceat(length, first)


def _fits(run: Run) -> bool:
    return all(abs(v) < 1 << 63 for v in (run.local_offset, run.remote_offset, run.length))
