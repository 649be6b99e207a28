"""Meeting at one address: threads are the ranks, since a membership has no process-wide state."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from baton.core.errors import InvalidConfig, RankLost
from baton.parallel.join import Meeting, join_mesh, listen
from baton.parallel.mesh import AXES, Mesh

LONG_S = 60.0


def meet(mesh: Mesh, deadline_s: float = LONG_S) -> tuple[Meeting, socket.socket]:
    listener = listen("127.0.0.1")
    return Meeting(mesh, "127.0.0.1", listener.getsockname()[1], "gloo", deadline_s), listener


def test_a_mesh_of_one_meets_nobody() -> None:
    meeting, listener = meet(Mesh())
    with join_mesh(meeting, 0, listener) as membership:
        assert all(getattr(membership.ranks, axis).size == 1 for axis in AXES)


def test_the_leader_listens_on_the_given_address_only() -> None:
    with listen("127.0.0.1") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(InvalidConfig, match=r"host: 'no\.such\.host\.invalid' is not allowed"):
        listen("no.such.host.invalid")


def test_ranks_that_do_not_all_come_are_told_so() -> None:
    """Rank 1 of 3 is missing."""
    meeting, listener = meet(Mesh(tp=3), deadline_s=1)

    def come(rank: int) -> str:
        with pytest.raises(RankLost) as caught:
            join_mesh(meeting, rank, listener if rank == 0 else None)
        return str(caught.value)

    with ThreadPoolExecutor(2) as threads:
        for rank, said in zip((0, 2), threads.map(come, (0, 2)), strict=True):
            assert said.startswith(f"rank {rank} of tp3 met not all others at 127.0.0.1:")


def test_one_process_can_leave_a_mesh_and_join_another() -> None:
    for mesh in (Mesh(tp=2), Mesh(pp=2, tp=2)):
        meeting, listener = meet(mesh)

        def come(
            rank: int, meeting: Meeting = meeting, listener: socket.socket = listener
        ) -> float:
            with join_mesh(meeting, rank, listener if rank == 0 else None) as membership:
                return float(membership.ranks.tp.all_reduce_(torch.tensor([1.0 + rank])))

        with ThreadPoolExecutor(mesh.size) as threads:
            found = list(threads.map(come, range(mesh.size)))
        assert found == [sum(1.0 + r for r in mesh.line(rank, "tp")) for rank in range(mesh.size)]


def test_leaving_wakes_who_waits() -> None:
    """Long before the deadline: else this test would not end in time."""
    meeting, listener = meet(Mesh(tp=2))

    def come(rank: int) -> None:
        with join_mesh(meeting, rank, listener if rank == 0 else None) as membership:
            membership.ranks.tp.all_reduce_(torch.ones(1))
            if rank == 0:
                with pytest.raises(RankLost, match=r"tp group 0,1"):
                    membership.ranks.tp.all_reduce_(torch.ones(1))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(come, range(2)))
