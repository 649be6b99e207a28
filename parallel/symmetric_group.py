"""Small all-reduces among the GPUs of one host, through memory that each can read of the others.

A message is copied to memory that the GPUs have mapped of each other (torch's symmetric memory);
one kernel waits for all and adds up what it reads from everybody, over NVLink: one launch and one
way, where a ring takes 2 (size - 1). It adds in the order of the ranks, hence the same bits on all;
bfloat16 is rounded after each addition.

Written against torch 2.13 and checked by the type checker and on tensors without memory; no GPU has
run it.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from baton.core.log import get_logger
from baton.parallel.group import Group
from baton.parallel.host_links import host_id
from baton.parallel.layered_group import LayeredGroup

LIMIT_BYTES = 256 << 10
"""The longest message that goes this way: every rank reads size - 1 messages, in a ring less than
two. Provisional and unmeasured: where a ring becomes the faster way is not known yet, and depends
on the ranks and their links."""

_MOST_RANKS = 8
_TYPES = (torch.float32, torch.bfloat16)
_GRAIN = 16
"""Bytes; the kernel reads so many at a time."""

_log = get_logger(__name__)


class SymmetricGroup(LayeredGroup):
    """See Group; what the kernel cannot do or would do more slowly goes to the group below."""

    def __init__(self, below: Group, buffer: Tensor, name: str) -> None:
        """`buffer` is this rank's uint8, which the others have mapped as group `name`."""
        super().__init__(below)
        self._buffer = buffer
        self._name = name

    def all_reduce_(self, x: Tensor) -> Tensor:
        """See Group."""
        return x.copy_(self._sum(x)) if self._suits(x) else self.below.all_reduce_(x)

    def addends(self, x: Tensor) -> Sequence[Tensor]:
        """See Group: the sum as the kernel has written it."""
        return (self._sum(x),) if self._suits(x) else self.below.addends(x)

    def leave(self) -> None:
        """Give the memory back; peers that wait are ended by NCCL's watchdog."""
        self._buffer = self._buffer.new_empty(0)

    def _suits(self, x: Tensor) -> bool:
        fits = 0 < x.nbytes <= self._buffer.numel() and x.nbytes % _GRAIN == 0
        return fits and x.dtype in _TYPES

    def _sum(self, x: Tensor) -> Tensor:
        shared = self._buffer[: x.nbytes].view(x.dtype)
        reduce: Any = torch.ops.symm_mem.one_shot_all_reduce_copy
        found: Tensor = reduce(shared, x.view(-1), "sum", self._name)
        return found.view(x.shape)


def symmetric(
    below: Group, store: c10d.Store, name: str, device: torch.device
) -> SymmetricGroup | None:
    """Return a group through symmetric memory, or None, on all ranks, if it cannot be had.

    That is on ranks of several hosts, on many ranks, and on GPUs that cannot map each other.
    """
    if below.size > _MOST_RANKS or not _on_one_host(store, below):
        return None
    memory, name = c10d._SymmetricMemory, f"{name} {_token(store, below)}"
    try:
        memory.set_group_info(name, below.rank, below.size, c10d.PrefixStore("symmetric", store))
        buffer = memory.empty_strided_p2p((LIMIT_BYTES,), (1,), torch.uint8, device, name)
        memory.rendezvous(buffer, name)
    except RuntimeError as error:
        _log.warning("no symmetric memory between GPUs", group=name, why=str(error).splitlines()[0])
        buffer = torch.empty(0, dtype=torch.uint8, device=device)
    mapped = torch.tensor([buffer.numel() > 0], dtype=torch.int32, device=device)
    if int(below.all_reduce_(mapped)) < below.size:
        return None
    return SymmetricGroup(below, buffer, name)


def _token(store: c10d.Store, group: Group) -> str:
    """Return what tells this group from all that the process was in before: torch keeps names."""
    if group.rank == 0:
        store.set("symmetric token", secrets.token_hex(8))
    return store.get("symmetric token").decode()


def _on_one_host(store: c10d.Store, group: Group) -> bool:
    """Return whether all ranks are on one host, by what they say in the store."""
    store.set(f"host {group.rank}", host_id().hex())
    told = {store.get(f"host {rank}") for rank in range(group.size)}
    return len(told) == 1
