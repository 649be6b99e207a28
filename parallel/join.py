"""How a process becomes a rank: it meets the others at one address and gets its groups."""

import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Literal

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from baton.core.errors import InvalidConfig, RankLost
from baton.parallel.counted_group import CountedGroup, Traffic
from baton.parallel.device_mesh import backend_of, connect, device_mesh_of, line_of
from baton.parallel.group import Group, Ranks
from baton.parallel.mesh import AXES, Axis, Mesh
from baton.parallel.one_shot_group import OneShotGroup, one_shot
from baton.parallel.quantised_group import QuantisedGroup
from baton.parallel.symmetric_group import SymmetricGroup, symmetric
from baton.parallel.torch_group import NcclGroup, TorchGroup

Library = Literal["gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where and how the ranks of one instance meet; the same on all of them."""

    mesh: Mesh
    host: str
    """The leader's address, which the other ranks can reach; it listens on no other."""
    port: int
    library: Library
    deadline_s: float
    """For all to have come, and then for every call of a group."""
    int8_from_bytes: int | None = None
    """All-reduces along tp of so many bytes or more travel as int8, at the cost of the error that
    QuantisedGroup states; None: none do."""


class Membership:
    """One rank's groups, and what they stand on; leave it when no call is under way."""

    def __init__(self, store: c10d.Store | None) -> None:
        self.ranks = Ranks()
        self.traffic: dict[Axis, Traffic] = {}
        """What the groups of more than one rank have moved."""
        self.device_mesh: DeviceMesh | None = None
        """The mesh as torch has it, whose process groups carry these; None if nobody else is."""
        self._store = store  # NCCL asks it again when two ranks first talk
        self._leavable: list[TorchGroup | OneShotGroup | SymmetricGroup] = []

    def __enter__(self) -> "Membership":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()

    def _add(self, axis: Axis, group: Group) -> None:
        self.ranks = replace(self.ranks, **{axis: group})

    def leave(self) -> None:
        """Cut all connections, without waiting for anybody.

        A rank that loses one of its groups leaves all: who waits for it elsewhere in the mesh
        learns of it now and not after the deadline.
        """
        groups, self._leavable = self._leavable, []
        for group in groups:
            group.leave()
        self.device_mesh = self._store = None


def listen(host: str, port: int = 0) -> socket.socket:
    """Return the leader's listening socket, for join_mesh; port 0 takes a free one."""
    return socket.create_server((host, port), family=_family(host), backlog=128)


def join_mesh(
    meeting: Meeting,
    rank: int,
    listener: socket.socket | None = None,
    device: torch.device | None = None,
) -> Membership:
    """Meet the other ranks and return this one's groups; rank 0 gives its `listener` away.

    `device` is this rank's GPU, of its own, for NCCL; the calling thread's current device from now
    on, as it must be that of each thread that calls a group. Raises RankLost if not all have come
    within the deadline, InvalidConfig if there is no such device.
    """
    assert (listener is not None) == (rank == 0), "the leader listens, and nobody else"
    _check_device(meeting, device)
    if meeting.mesh.size == 1:
        return Membership(None)
    try:
        store = _store(meeting, rank, listener)
        membership = Membership(store)
        try:
            device = device or torch.device("cpu")
            device_mesh = device_mesh_of(meeting.mesh, rank, device.type)
            membership.device_mesh = device_mesh
            connect(device_mesh, store, partial(_backend, meeting, device))
            for axis in AXES:
                if meeting.mesh.length(axis) > 1:
                    membership._add(axis, _group(membership, meeting, axis, store, device))
        except BaseException:
            membership.leave()
            raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RankLost(
            f"rank {rank} of {meeting.mesh} met not all others at {meeting.host}:{meeting.port} "
            f"in {meeting.deadline_s:g} s: {reason}"
        ) from error
    return membership


def _check_device(meeting: Meeting, device: torch.device | None) -> None:
    """Raise InvalidConfig for a device that the library has no use for; make it the current one."""
    if meeting.library == "gloo":
        if device is not None and device.type != "cpu":
            raise InvalidConfig("device", str(device), "cpu, with the library gloo")
    elif device is None or device.type != "cuda" or device.index is None:
        raise InvalidConfig("device", str(device), "a GPU and its number, with the library nccl")
    elif device.index >= torch.cuda.device_count():
        allowed = f"one of the {torch.cuda.device_count()} GPUs that this process sees"
        raise InvalidConfig("device", str(device), allowed)
    else:
        torch.cuda.set_device(device)


def _store(meeting: Meeting, rank: int, listener: socket.socket | None) -> c10d.Store:
    """Return the store over which the groups' ranks find each other; rank 0 serves it."""
    return c10d.TCPStore(
        meeting.host,
        meeting.port,
        meeting.mesh.size,
        is_master=rank == 0,
        timeout=timedelta(seconds=meeting.deadline_s),
        # Left to itself torch would listen on all addresses.
        master_listen_fd=listener.detach() if listener else None,
    )


def _group(
    membership: Membership, meeting: Meeting, axis: Axis, store: c10d.Store, device: torch.device
) -> Group:
    """Return this rank's group along an axis: the library's, what does better, and what counts."""
    mesh = membership.device_mesh
    assert mesh is not None, "a group of no mesh"
    line, place = line_of(mesh, axis), mesh.get_group(axis).rank()
    name, backend = f"{axis} group {','.join(map(str, line))}", backend_of(mesh, axis)
    better: OneShotGroup | SymmetricGroup | None
    if meeting.library == "gloo":
        library = TorchGroup(backend, place, len(line), name, membership.leave)
        membership._leavable.append(library)
        better = one_shot(library, meeting.deadline_s, membership.leave)
    else:
        library = NcclGroup(backend, place, len(line), name, membership.leave)
        membership._leavable.append(library)
        better = symmetric(library, c10d.PrefixStore(name, store), name, device)
    if better is not None:
        membership._leavable.append(better)
    membership.traffic[axis] = Traffic()
    group: Group = CountedGroup(better or library, membership.traffic[axis])
    if axis == "tp" and meeting.int8_from_bytes is not None:
        group = QuantisedGroup(group, meeting.int8_from_bytes)
    return group


def _backend(
    meeting: Meeting, device: torch.device, store: c10d.Store, place: int, size: int
) -> c10d.Backend:
    """Return the library's group, connected: NCCL by itself would connect in the first step."""
    deadline = timedelta(seconds=meeting.deadline_s)
    if meeting.library == "gloo":
        options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = deadline
        options._devices, options._threads = [_gloo_device(meeting)], 1
        return c10d.ProcessGroupGloo(store, place, size, options)
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = deadline
    backend = c10d.ProcessGroupNCCL(store, place, size, options)
    backend.eager_connect_single_device(device)
    return backend


def _gloo_device(meeting: Meeting) -> object:
    """Return Gloo's event loop on the address from which this rank reaches the leader."""
    with socket.socket(_family(meeting.host), socket.SOCK_DGRAM) as probe:
        probe.connect((meeting.host, meeting.port))  # sends nothing
        own = probe.getsockname()[0]
    return c10d.ProcessGroupGloo.create_device(hostname=own)


def _family(host: str) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        raise InvalidConfig("host", host, "an address or a name that resolves to one") from None
