"""Small collectives among the ranks of one host, through shared memory.

For a call each rank writes its tensor into a slot of its own, tells every peer so by a message on
a socket, waits for theirs, and reads all slots: one wait, where a ring over TCP has 2 (size - 1).

    turn 0   slot of rank 0 | slot of rank 1 | …
    turn 1   slot of rank 0 | slot of rank 1 | …      calls take turns

When a rank writes turn 0 again, all peers have spoken in the call between, hence have read what
was in turn 0 before. The messages go through the kernel, so that what was written before the one
is seen after the other on every processor, and a waiting rank sleeps and leaves its core to those
it waits for; a peer's death ends the wait at once. Each rank adds up everything itself, in the
order of the ranks: the same bits on all.
"""

import math
import socket
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NoReturn

import torch
from torch import Tensor

from baton.core.errors import RankLost
from baton.parallel.group import Group, even_rows
from baton.parallel.host_links import HostLinks, connect_on_host
from baton.parallel.layered_group import LayeredGroup

LIMIT_BYTES = 4 << 20
"""The longest message that goes this way.

bench/parallel.py finds it the faster way up to 32 MiB on two ranks, and on four clearly up to 2 MiB
and at least as fast as Gloo above on all but a crowded machine. So memory decides as well: the
slots come to take 2 size LIMIT_BYTES. This holds 512 tokens of 2048 float32.
"""

_TURNS = 2
_KNOWN_SHAPES = 256
_MESSAGE = struct.Struct("<QIQ")  # which call, bytes of an element, elements on all ranks
_Parts = list[Tensor]


class OneShotGroup(LayeredGroup):
    """See Group; what is long, or made for one peer, goes to the group below."""

    def __init__(self, below: Group, links: HostLinks, on_lost: Callable[[], None]) -> None:
        super().__init__(below)
        self._links = links
        self._slots = links.memory.view(_TURNS, below.size, -1)
        self._limit = self._slots.shape[2]
        self._on_lost = on_lost
        self.calls = 0
        """How many went this way."""
        self._lost = ""
        self._slots_as = lru_cache(_KNOWN_SHAPES)(self._slots_of)

    def all_reduce_(self, x: Tensor) -> Tensor:
        """See Group."""
        if not 0 < x.nbytes <= self._limit:
            return self.below.all_reduce_(x)
        sizes = (x.numel(),) * self.size
        _add(self._shared(x, sizes), x.view(-1))
        return x

    def all_gather(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        rows = [x.shape[0]] * self.size if rows is None else rows
        width = math.prod(x.shape[1:])
        if not 0 < max(rows) * width * x.itemsize <= self._limit:
            return self.below.all_gather(x, rows)
        parts = self._shared(x, tuple(n * width for n in rows))
        return torch.cat(parts).view(-1, *x.shape[1:])

    def reduce_scatter(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        if not 0 < x.nbytes <= self._limit:
            return self.below.reduce_scatter(x, rows)
        rows = even_rows(x, self.size) if rows is None else rows
        width = math.prod(x.shape[1:])
        first, own = sum(rows[: self.rank]), rows[self.rank]
        parts = self._shared(x, (x.numel(),) * self.size)
        mine = [part[first * width : (first + own) * width] for part in parts]
        return _add(mine, x.new_empty(own * width)).view(own, *x.shape[1:])

    def leave(self) -> None:
        """Hang up on the peers: those that wait get RankLost."""
        self._lost = self._lost or f"{self.below} was left"
        self._links.close()

    def _shared(self, x: Tensor, sizes: tuple[int, ...]) -> _Parts:
        """Return what all ranks have shared in this call, of these numbers of elements."""
        if self._lost:
            raise RankLost(self._lost)
        parts = self._slots_as(self.calls % _TURNS, x.dtype, sizes)
        parts[self.rank].copy_(x.view(-1))
        self.calls += 1
        self._meet(_MESSAGE.pack(self.calls, x.itemsize, sum(sizes)))
        return parts

    def _meet(self, message: bytes) -> None:
        """Tell all peers, wait for all of them; what they say proves that calls are in step."""
        for place, link in self._links.sockets.items():
            try:
                link.send(message)
            except OSError as error:
                self._lose(place, error)
        for place, link in self._links.sockets.items():
            try:
                said = link.recv(len(message))
            except OSError as error:
                self._lose(place, error)
            if not said:
                self._lose(place, ConnectionResetError("it is gone"))
            assert said == message, f"{_MESSAGE.unpack(said)}, here {_MESSAGE.unpack(message)}"

    def _lose(self, place: int, error: OSError) -> NoReturn:
        late = isinstance(error, BlockingIOError)
        reason = "it was silent beyond the deadline" if late else str(error)
        self._lost = f"rank {place} of {self.below}: {reason}"
        self._on_lost()
        raise RankLost(self._lost) from error

    def _slots_of(self, turn: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> _Parts:
        slots = self._slots[turn]
        return [slots[i, : n * dtype.itemsize].view(dtype) for i, n in enumerate(sizes)]


def one_shot(
    below: Group, deadline_s: float, on_lost: Callable[[], None], limit_bytes: int = LIMIT_BYTES
) -> OneShotGroup | None:
    """Return a group that goes through shared memory, or None on ranks of several hosts."""
    links = connect_on_host(below, _TURNS * below.size * limit_bytes, deadline_s)
    if links is None:
        return None
    whole, part = divmod(deadline_s, 1)
    wait = struct.pack("@ll", int(whole), int(part * 1e6))
    for link in links.sockets.values():
        # One system call a wait, where Python's own time-outs poll first.
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
    return OneShotGroup(below, links, on_lost)


def _add(parts: _Parts, into: Tensor) -> Tensor:
    """Write the sum of flat parts, one after the other, and return it; short floats in float32."""
    if into.is_floating_point() and into.itemsize < 4 and len(parts) > 2:
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return into.copy_(total)
    torch.add(parts[0], parts[1], out=into)
    for part in parts[2:]:
        into += part
    return into
