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

_MAX = (1 << 63) - 1
_FEW = 8
"""Fewer runs are checked one by one: each operation on columns costs about a microsecond."""


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
    def columns(self) -> Columns:
        """Local offsets, remote offsets and lengths."""
        return self.local, self.remote, self.length

    @property
    def nbytes(self) -> int:
        """Bytes that the runs move."""
        return int(np.add.reduce(self.length))

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
    """Return `runs` as a table, each merged with the one before it if it continues that one.

    Raises TransportError if a run leaves the local or the remote region.
    """
    remote_length = min(remote_length, _MAX)  # as far as the peer may be believed
    try:
        table = runs if isinstance(runs, RunTable) else RunTable.of(runs)
    except OverflowError:
        table = None
    if table is None or len(table) < _FEW or not _within(table, local_length, remote_length):
        for run in runs:
            _check(run, local_length, remote_length)
    assert table is not None, "no region is so long"
    return table if len(table) < 2 else RunTable(*_join(*table.columns))


def _within(table: RunTable, local_length: int, remote_length: int) -> bool:
    local, remote, length = table.columns
    # Not by their ends, which may be more than 64 bits hold.
    within = (length > 0) & (local >= 0) & (local <= local_length - length)
    within &= (remote >= 0) & (remote <= remote_length - length)
    return bool(within.all())


def _check(run: Run, local_length: int, remote_length: int) -> None:
    length = run.length
    if length <= 0 or not 0 <= run.local_offset <= local_length - length:
        raise TransportError(f"{run} leaves the local region of {local_length} bytes")
    if not 0 <= run.remote_offset <= remote_length - length:
        raise TransportError(f"{run} leaves the remote region of {remote_length} bytes")


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
