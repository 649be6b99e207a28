"""Tables of runs: bounds, merging, cutting."""

import numpy as np
import pytest

from baton.core.errors import TransportError
from baton.kv_transfer.runs import RunTable, checked_runs
from baton.kv_transfer.transport import Run

SIZE = 8 << 20


@pytest.mark.parametrize(
    ("run", "side"),
    [
        (Run(SIZE - 1, 0, 2), "local"),
        (Run(-1, 0, 2), "local"),
        (Run(0, SIZE - 1, 2), "remote"),
        (Run(0, -1, 2), "remote"),
        (Run(0, 0, 0), "local"),
        (Run(0, 1 << 64, 1), "remote"),
    ],
)
def test_a_run_that_leaves_a_region_is_refused(run: Run, side: str) -> None:
    for before in (1, 100):  # checked one by one, and by columns
        runs = [Run(i * 3, i * 5, 1) for i in range(before)]
        with pytest.raises(TransportError, match=f"leaves the {side} region"):
            checked_runs([*runs, run], SIZE, SIZE)


def test_a_peer_that_claims_to_be_endless_is_not_believed() -> None:
    for runs in ([Run(0, 1 << 63, 1)], [Run(i * 3, (1 << 63) - 1, 1) for i in range(100)]):
        with pytest.raises(TransportError, match="leaves the remote region"):
            checked_runs(runs, SIZE, 1 << 70)


def test_neighbours_on_both_sides_are_merged() -> None:
    runs = [Run(0, 10, 5), Run(5, 15, 5), Run(10, 21, 1), Run(12, 22, 1), Run(13, 23, 2)]
    assert list(checked_runs(runs, 100, 100)) == [Run(0, 10, 10), Run(10, 21, 1), Run(12, 22, 3)]


def test_neighbours_of_a_table_are_merged_in_their_order() -> None:
    table = RunTable.of([Run(50, 0, 5), Run(0, 10, 5), Run(5, 15, 5), Run(10, 21, 1)])
    assert list(checked_runs(table, 100, 100)) == [Run(50, 0, 5), Run(0, 10, 10), Run(10, 21, 1)]


def test_no_runs_are_an_empty_table() -> None:
    assert list(checked_runs([], 1, 1)) == []
    assert checked_runs([], 1, 1).nbytes == 0


def test_a_stretch_of_all_bytes_begins_and_ends_within_runs() -> None:
    table = RunTable.of([Run(0, 100, 10), Run(50, 200, 10), Run(90, 300, 10)])
    assert list(table.between(0, 30)) == list(table)
    assert list(table.between(10, 20)) == [Run(50, 200, 10)]
    assert list(table.between(4, 8)) == [Run(4, 104, 4)]
    assert list(table.between(4, 23)) == [Run(4, 104, 6), Run(50, 200, 10), Run(90, 300, 3)]
    assert table.nbytes == 30, "the table itself is as it was"


def test_some_runs_are_picked() -> None:
    table = RunTable.of([Run(0, 100, 10), Run(50, 200, 20)])
    assert list(table.where(np.array([False, True]))) == [Run(50, 200, 20)]
