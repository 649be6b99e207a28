"""What the calls of a group are counted as."""

import torch

from baton.parallel.counted_group import CountedGroup, Moved, Traffic
from baton.parallel.group import Group, Ranks
from baton.parallel.mesh import Mesh, Place

from .ranks import RankProcesses


def traffic_of(group: Group) -> Traffic:
    assert isinstance(group, CountedGroup)
    return group.traffic


def one_of_each(ranks: Ranks, place: Place) -> dict[str, Moved]:
    group = ranks.tp
    rows = torch.ones(group.size * 4, 8)  # 32 bytes a row
    group.all_reduce_(rows)
    group.addends(rows)
    group.all_gather(torch.ones(group.rank, 8), range(group.size))
    group.reduce_scatter(rows)
    group.all_to_all(rows, [4] * group.size, [4] * group.size)
    group.broadcast_(rows, 1)
    if group.rank == 0:
        group.send(rows, 1)
    elif group.rank == 1:
        group.receive_(rows, 0)
    return traffic_of(group).stats()


def test_calls_are_counted_by_kind_with_the_bytes_that_must_cross_the_link(
    processes: RankProcesses,
) -> None:
    found = processes.run(Mesh(tp=3), one_of_each)
    whole = 12 * 32
    for rank, stats in enumerate(found):
        counts = {kind: (moved.calls, moved.bytes) for kind, moved in stats.items()}
        last = {0: {"send": (1, whole)}, 1: {"receive": (1, whole)}, 2: {}}[rank]
        assert counts == {
            "all_reduce": (2, 2 * whole * 4 // 3),
            "all_gather": (1, (0 + 1 + 2 - rank) * 32),
            "reduce_scatter": (1, whole * 2 // 3),
            "all_to_all": (1, whole * 2 // 3),
            "broadcast": (1, whole),
            **last,
        }
        assert all(moved.seconds > 0 for moved in stats.values())


def test_stats_are_copies() -> None:
    traffic = Traffic()
    traffic.add("send", 5, 0.0)
    before = traffic.stats()
    traffic.add("send", 5, 0.0)
    assert before["send"].calls == 1
    assert traffic.stats()["send"].bytes == 10
