"""The ranks of one instance as torch has them: a DeviceMesh whose dimensions are the axes.

Its process groups belong to the rank, and not to the process. torch makes those of
`init_device_mesh` upon the one default group that a process may have; so that could not lead two
instances, nor leave a mesh and join another. What torch answers by asking the default group,
slices of the mesh and `get_local_rank`, is not to be had: ask a group for its rank.
"""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from baton.parallel.mesh import AXES, Axis, Mesh

MakeBackend = Callable[[c10d.Store, int, int], c10d.Backend]
"""Makes a ProcessGroupGloo or the like of a store of its own, the rank's place and the size."""

_BACKENDS = {
    "cpu": ProcessGroup.BackendType.GLOO,
    "cuda": ProcessGroup.BackendType.NCCL,
}
_NUMBERS: Iterator[int] = count()
"""torch finds groups by name, whichever rank of this process they are of."""


def device_mesh_of(mesh: Mesh, rank: int, kind: str) -> DeviceMesh:
    """Return the mesh as `rank` sees it, of devices of one kind, still without groups."""
    ranks = torch.arange(mesh.size).view([mesh.length(axis) for axis in AXES])
    return DeviceMesh(kind, ranks, mesh_dim_names=AXES, _init_backend=False, _rank=rank)


def line_of(device_mesh: DeviceMesh, axis: Axis) -> tuple[int, ...]:
    """Return the ranks that differ from this one along `axis` only, itself included, in order."""
    place = device_mesh.get_coordinate()
    assert place is not None, "a rank beyond the mesh"
    at = AXES.index(axis)
    ranks = device_mesh.mesh.movedim(at, -1)[place[:at] + place[at + 1 :]]
    return tuple(ranks.tolist())


def connect(device_mesh: DeviceMesh, store: c10d.Store, make: MakeBackend) -> None:
    """Give the mesh a process group along each axis; every rank of it does, at the same time.

    Along an axis of one rank the group has no backend: there is nobody to talk to. Each group lasts
    as long as the mesh, or whoever else has it.
    """
    groups: dict[Any, ProcessGroup] = {}  # by what newer torch calls a GroupName
    for axis in AXES:
        name: Any = f"baton {axis} {next(_NUMBERS)}"
        groups[name] = _process_group(device_mesh, axis, name, store, make)
        c10d._register_process_group(name, groups[name])
    # As DeviceMesh.from_group does, which asks the default group who this rank is.
    device_mesh._dim_group_names = list(groups)
    device_mesh._pg_registry = dict(groups)


def backend_of(device_mesh: DeviceMesh, axis: Axis) -> c10d.Backend:
    """Return what carries the group along an axis of several ranks."""
    group = device_mesh.get_group(axis)
    return group._get_backend(torch.device(device_mesh.device_type))


def _process_group(
    device_mesh: DeviceMesh, axis: Axis, name: Any, store: c10d.Store, make: MakeBackend
) -> ProcessGroup:
    line, kind = line_of(device_mesh, axis), device_mesh.device_type
    own = c10d.PrefixStore(f"{axis} {','.join(map(str, line))}", store)
    place = line.index(device_mesh._rank)
    group = ProcessGroup(own, place, len(line))
    if len(line) > 1:
        group._register_backend(torch.device(kind), _BACKENDS[kind], make(own, place, len(line)))
        group._set_group_name(name)
    return group
