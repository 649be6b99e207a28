"""What every group does, on every rank's process: over Gloo, through shared memory, as joined."""

import hashlib
import os
import signal
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from baton.core.errors import RankLost
from baton.parallel.group import Group, Ranks
from baton.parallel.layered_group import LayeredGroup
from baton.parallel.mesh import AXES, Mesh, Place
from baton.parallel.one_shot_group import OneShotGroup

from .ranks import PATIENCE_S, RankFailed, RankProcesses

SIZES = (2, 3, 4)
LAYERS = ("library", "shared", "counted")
ROWS = ((3, 3, 3, 3), (0, 5, 1, 2), (4, 0, 0, 0), (0, 0, 0, 0), (1, 17, 300, 2))
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
MOVED = (*TYPES, torch.bool, torch.float8_e4m3fn)


def part_of(rank: int, rows: int, dtype: torch.dtype = torch.float32, columns: int = 5) -> Tensor:
    """What a rank has: different on each, and known to all; on torch's default device."""
    random = torch.Generator("cpu").manual_seed(rank)
    drawn = torch.randint(0, 32, (rows, columns), generator=random, device="cpu")
    return drawn.to(dtype).to(torch.get_default_device())


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


def check_sums(group: Group) -> None:
    for dtype in TYPES:
        for rows in (0, 1, 7, 1000):
            x = part_of(group.rank, rows, dtype)
            returned = group.all_reduce_(x)
            assert returned is x
            expected = sum_of(group, [rows] * group.size, dtype)
            same(x, expected)
            addends = group.addends(part_of(group.rank, rows, dtype))
            assert all(addend.shape == x.shape for addend in addends)
            same(torch.stack(list(addends)).sum(0, dtype=dtype), expected)


def sum_of(group: Group, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
    # Small whole numbers: every order of adding gives the same bits.
    parts = [part_of(rank, n, dtype) for rank, n in enumerate(rows)]
    return torch.stack(parts).sum(0, dtype=dtype)


def check_gathers(group: Group) -> None:
    for dtype in MOVED:
        for rows in (row[: group.size] for row in ROWS):
            whole = torch.cat([part_of(rank, n, dtype) for rank, n in enumerate(rows)])
            same(group.all_gather(part_of(group.rank, rows[group.rank], dtype), rows), whole)
        even = torch.cat([part_of(rank, 2, dtype) for rank in range(group.size)])
        same(group.all_gather(part_of(group.rank, 2, dtype)), even)
        same(group.all_gather(part_of(group.rank, 2, dtype)[:, 0].contiguous()), even[:, 0])


def check_scatters(group: Group) -> None:
    for dtype in TYPES:
        for rows in (row[: group.size] for row in ROWS):
            x = part_of(group.rank, sum(rows), dtype)
            total = sum_of(group, [sum(rows)] * group.size, dtype)
            same(group.reduce_scatter(x, rows), total.split(list(rows))[group.rank])
        x = part_of(group.rank, 2 * group.size, dtype)
        total = sum_of(group, [2 * group.size] * group.size, dtype)
        same(group.reduce_scatter(x), total.split(2)[group.rank])


def check_exchanges(group: Group) -> None:
    """Rank i sends (i + 2 j) mod 4 rows to rank j: some none."""
    sent = [[(i + 2 * j) % 4 for j in range(group.size)] for i in range(group.size)]
    for dtype in MOVED:
        none = [0] * group.size
        same(group.all_to_all(part_of(group.rank, 0, dtype), none, none), part_of(0, 0, dtype))
        x = part_of(group.rank, sum(sent[group.rank]), dtype)
        received = [row[group.rank] for row in sent]
        parts = [part_of(i, sum(row), dtype).split(row)[group.rank] for i, row in enumerate(sent)]
        same(group.all_to_all(x, sent[group.rank], received), torch.cat(parts))
        begun = group.start_all_to_all(x, sent[group.rank], received)
        x.sum(dtype=torch.float32)  # there is time to compute
        same(begun.wait(), torch.cat(parts))


def check_messages(group: Group) -> None:
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for dtype in MOVED:
        for source in range(group.size):
            x = part_of(group.rank, 3, dtype)
            assert group.broadcast_(x, source) is x
            same(x, part_of(source, 3, dtype))
        for rows in (0, 1, 1000):
            x = part_of(group.rank, rows, dtype)
            into = torch.empty_like(x)
            # In a ring somebody has to listen first.
            if group.rank % 2 == 0:
                group.send(x, after)
            group.receive_(into, before)
            if group.rank % 2:
                group.send(x, after)
            same(into, part_of(before, rows, dtype))


CHECKS = (check_sums, check_gathers, check_scatters, check_exchanges, check_messages)


def layer(group: Group, name: str) -> Group:
    """Return one of the groups that `join_mesh` puts upon each other."""
    layers: list[Group] = [group]
    while isinstance(layers[-1], LayeredGroup):
        layers.append(layers[-1].below)
    counted, shared, library = layers
    assert isinstance(shared, OneShotGroup), "these ranks are on one host"
    return {"counted": counted, "shared": shared, "library": library}[name]


def check_all(ranks: Ranks, place: Place, name: str) -> None:
    group = layer(ranks.tp, name)
    for check in CHECKS:
        check(group)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", SIZES)
def test_every_collective_moves_and_adds_what_it_says(
    processes: RankProcesses, size: int, name: str
) -> None:
    processes.run(Mesh(tp=size), check_all, name)


def digest_of_random_sum(ranks: Ranks, place: Place, dtype: torch.dtype, name: str) -> list[str]:
    random = torch.Generator().manual_seed(100 + place.tp)
    digests = []
    for length in (1, 2, 5, 63, 1025, 70_001):
        x = torch.randn(length, generator=random).to(dtype)
        total = layer(ranks.tp, name).all_reduce_(x).view(torch.uint8).numpy()
        digests.append(hashlib.sha256(total.tobytes()).hexdigest())
    return digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["library", "shared"])
@pytest.mark.parametrize("size", SIZES)
def test_a_sum_has_the_same_bits_on_every_rank(
    processes: RankProcesses, size: int, dtype: torch.dtype, name: str
) -> None:
    digests = processes.run(Mesh(tp=size), digest_of_random_sum, dtype, name)
    assert digests == [digests[0]] * size


def lines_of(ranks: Ranks, place: Place, mesh: Mesh) -> dict[str, list[int]]:
    own = torch.tensor([mesh.rank(place)])
    return {axis: getattr(ranks, axis).all_gather(own).tolist() for axis in AXES}


@pytest.mark.parametrize("mesh", [Mesh(pp=2, tp=2), Mesh(ep=2, cp=2), Mesh(tp=1)], ids=str)
def test_every_axis_is_a_group_of_its_own(processes: RankProcesses, mesh: Mesh) -> None:
    found = processes.run(mesh, lines_of, mesh)
    for rank, lines in enumerate(found):
        assert lines == {axis: list(mesh.line(rank, axis)) for axis in lines}


# Death and silence


def add_for_long(*groups: Group) -> None:
    for _ in range(1000):
        for group in groups:
            group.all_reduce_(torch.ones(3))


def lose(ranks: Ranks, place: Place, how: signal.Signals, victim: int, name: str) -> str:
    """One rank gets the signal in the midst of things; the others say what they meet."""
    tp, pp = layer(ranks.tp, name), layer(ranks.pp, name)
    rank = 2 * place.pp + place.tp
    tp.all_reduce_(torch.ones(3))
    if rank == victim:
        os.kill(os.getpid(), how)
    with pytest.raises(RankLost) as caught:
        add_for_long(tp, pp)
    with pytest.raises(RankLost):
        tp.all_gather(torch.ones(3))
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "deadline_s"), [(signal.SIGKILL, 10 * PATIENCE_S), (signal.SIGSTOP, 4)]
)
@pytest.mark.parametrize("name", ["library", "shared"])
def test_one_lost_rank_is_an_error_on_all(
    processes: RankProcesses, name: str, how: signal.Signals, deadline_s: float
) -> None:
    """Also on the rank that shares no group with the lost one; at once if its process is gone."""
    mesh, victim = Mesh(pp=2, tp=2), 3
    processes.run(mesh, lines_of, mesh)  # so that all are there when the short deadline begins
    outcomes = processes.outcomes(mesh, lose, how, victim, name, deadline_s=deadline_s, lost=victim)
    assert isinstance(outcomes.pop(victim), RankFailed)
    for outcome in outcomes:
        assert isinstance(outcome, str), outcome
        assert "group" in outcome
