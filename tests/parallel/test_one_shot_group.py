"""Shared memory: what goes this way, turns, calls out of step, and ranks on two hosts."""

import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch

from baton.parallel import host_links
from baton.parallel.counted_group import CountedGroup
from baton.parallel.group import Group, Ranks
from baton.parallel.join import Meeting, join_mesh, listen
from baton.parallel.mesh import Mesh, Place
from baton.parallel.one_shot_group import LIMIT_BYTES, OneShotGroup, one_shot
from baton.parallel.torch_group import TorchGroup

from .ranks import PATIENCE_S, RankFailed, RankProcesses


def shared(group: Group) -> OneShotGroup:
    assert isinstance(group, CountedGroup)
    assert isinstance(group.below, OneShotGroup)
    return group.below


def ways(ranks: Ranks, place: Place) -> list[bool]:
    """Return which of these calls went through shared memory."""
    group = shared(ranks.tp)
    most = LIMIT_BYTES // 4
    found = []
    for call in (
        lambda: group.all_reduce_(torch.ones(most)),
        lambda: group.all_reduce_(torch.ones(most + 1)),
        lambda: group.all_gather(torch.ones(most)),
        lambda: group.all_gather(torch.ones((0, most + 1)[group.rank]), [0, most + 1]),
        lambda: group.reduce_scatter(torch.ones(most)),
        lambda: group.reduce_scatter(torch.ones(most + 2)),
        lambda: group.all_reduce_(torch.ones(0)),
    ):
        before = group.calls
        call()
        found.append(group.calls > before)
    return found


def test_the_size_that_all_ranks_know_decides(processes: RankProcesses) -> None:
    expected = [True, False, True, False, True, False, False]
    assert processes.run(Mesh(tp=2), ways) == [expected] * 2


def add_out_of_breath(ranks: Ranks, place: Place, calls: int) -> None:
    """Each rank is late now and then, so that the fast ones would overwrite what is unread."""
    group, random = shared(ranks.tp), torch.Generator().manual_seed(place.tp)
    for call in range(calls):
        if torch.rand(1, generator=random) < 0.1:
            torch.ones(200_000).sum()
        x = torch.full((100 + call % 7,), float(call * (1 + group.rank)))
        expected = call * sum(range(1, group.size + 1))
        assert (group.all_reduce_(x) == expected).all()
        parts = group.all_gather(torch.tensor([call, group.rank])).view(-1, 2)
        assert parts.tolist() == [[call, rank] for rank in range(group.size)]


@pytest.mark.parametrize("size", [2, 3])
def test_slots_are_not_used_again_before_all_have_read(processes: RankProcesses, size: int) -> None:
    processes.run(Mesh(tp=size), add_out_of_breath, 500)


def out_of_step(ranks: Ranks, place: Place) -> None:
    ranks.tp.all_reduce_(torch.ones(4 + place.tp))


def test_ranks_whose_calls_differ_are_told_so(processes: RankProcesses) -> None:
    outcomes = processes.outcomes(Mesh(tp=2), out_of_step)
    for here, there, outcome in zip((8, 10), (10, 8), outcomes, strict=True):
        assert isinstance(outcome, RankFailed)
        assert f"says (4, {there}, 0), this one (4, {here}, 0)" in str(outcome)


def exchange_by_little(ranks: Ranks, place: Place, limit: int) -> int:
    """Rank i sends 40 (i + 1) (j + 1) bytes to rank j, through slots that hold less of that."""
    below = shared(ranks.tp).below
    group = one_shot(below, PATIENCE_S, lambda: None, limit_bytes=limit)
    assert group is not None
    rows = [[(i + 1) * (j + 1) for j in range(group.size)] for i in range(group.size)]

    def sent_by(rank: int) -> torch.Tensor:
        return torch.arange(sum(rows[rank]) * 5).view(-1, 5) + 10_000 * rank

    received = [row[group.rank] for row in rows]
    for _ in range(3):
        found = group.all_to_all(sent_by(group.rank), rows[group.rank], received)
        parts = [sent_by(rank).split(rows[rank])[group.rank] for rank in range(group.size)]
        assert torch.equal(found, torch.cat(parts))
    group.leave()
    return group.calls


@pytest.mark.parametrize("size", [2, 3])
def test_rows_that_do_not_fit_go_by_slotfuls(processes: RankProcesses, size: int) -> None:
    for limit in (8, 40, 120, 10_000):
        most = 40 * size * sum(range(1, size + 1))
        calls = processes.run(Mesh(tp=size), exchange_by_little, limit)
        assert calls == [3 * -(-most // limit)] * size


def exchange_out_of_step(ranks: Ranks, place: Place) -> None:
    ranks.tp.all_to_all(torch.ones(4), [2, 2], [2, 2] if place.tp == 0 else [3, 2])


def test_ranks_that_expect_other_rows_are_told_so(processes: RankProcesses) -> None:
    one, two = processes.outcomes(Mesh(tp=2), exchange_out_of_step)
    assert one is None
    assert "8 bytes of rank 0, not 12" in str(two)


def test_ranks_of_two_hosts_use_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = count()
    monkeypatch.setattr(host_links, "host_id", lambda: next(hosts).to_bytes(16, "little"))
    listener = listen("127.0.0.1")
    meeting = Meeting(Mesh(tp=2), "127.0.0.1", listener.getsockname()[1], "gloo", 60)

    def come(rank: int, given: socket.socket | None) -> float:
        with join_mesh(meeting, rank, given) as membership:
            group = membership.ranks.tp
            assert isinstance(group, CountedGroup)
            assert isinstance(group.below, TorchGroup)
            return float(group.all_reduce_(torch.ones(1)))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(come, (0, 1), (listener, None))) == [2, 2]
