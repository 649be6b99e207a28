"""torch's mesh and our arithmetic: two ways to the same ranks."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from baton.parallel.device_mesh import backend_of, device_mesh_of, line_of
from baton.parallel.join import Meeting, join_mesh, listen
from baton.parallel.mesh import AXES, Mesh

MOST_RANKS = 16


def meshes(ranks: int, sizes: tuple[int, ...] = ()) -> Iterator[Mesh]:
    """Yield every mesh of at most so many ranks."""
    if len(sizes) == len(AXES):
        yield Mesh(*sizes)
        return
    for size in range(1, ranks + 1):
        yield from meshes(ranks // size, (*sizes, size))


def test_both_agree_on_all_layouts() -> None:
    checked = 0
    for mesh in meshes(MOST_RANKS):
        for rank in {0, mesh.size // 2, mesh.size - 1}:
            found = device_mesh_of(mesh, rank, "cpu")
            assert found.mesh_dim_names == AXES
            assert found.get_coordinate() == astuple(mesh.place(rank))
            for axis in AXES:
                assert line_of(found, axis) == mesh.line(rank, axis)
        at = [int(found.mesh[astuple(place)]) for place in mesh.places]
        assert at == list(range(mesh.size))
        checked += 1
    assert checked > MOST_RANKS**2, "every size of every axis"


@pytest.fixture
def as_rank() -> Iterator[None]:
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 5, 11])
@pytest.mark.parametrize("mesh", [Mesh(pp=3, ep=2, tp=2), Mesh(dp=2, ep=2, cp=3)], ids=str)
def test_torch_makes_the_same_groups(as_rank: None, mesh: Mesh, rank: int) -> None:
    """By init_device_mesh, with a library that connects to nobody."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.size)
    theirs = init_device_mesh("cpu", astuple(mesh), mesh_dim_names=AXES)
    for axis in AXES:
        group = theirs.get_group(axis)
        assert tuple(distributed.get_process_group_ranks(group)) == mesh.line(rank, axis)
        assert group.rank() == getattr(mesh.place(rank), axis)


def test_groups_stand_upon_those_of_the_mesh() -> None:
    """On a process's own group each rank adds up what the line's ranks have."""
    mesh, listener = Mesh(dp=2, tp=2), listen("127.0.0.1")
    meeting = Meeting(mesh, "127.0.0.1", listener.getsockname()[1], "gloo", 60.0)

    def come(rank: int, listener: socket.socket = listener) -> dict[str, float]:
        with join_mesh(meeting, rank, listener if rank == 0 else None) as membership:
            device_mesh = membership.device_mesh
            assert device_mesh is not None
            groups = {axis: device_mesh.get_group(axis) for axis in AXES}
            assert {axis: group.size() for axis, group in groups.items()} == {
                axis: mesh.length(axis) for axis in AXES
            }
            sums = {}
            for axis in ("dp", "tp"):
                assert groups[axis].rank() == getattr(mesh.place(rank), axis)
                sums[axis] = torch.tensor([1.0 + rank])
                backend_of(device_mesh, axis).allreduce([sums[axis]]).wait()
        assert membership.device_mesh is None
        return {axis: float(total) for axis, total in sums.items()}

    with ThreadPoolExecutor(mesh.size) as threads:
        found = list(threads.map(come, range(mesh.size)))
    assert found == [
        {axis: sum(1.0 + r for r in mesh.line(rank, axis)) for axis in ("dp", "tp")}
        for rank in range(mesh.size)
    ]
