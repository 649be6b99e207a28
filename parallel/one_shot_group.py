"""Collectives among the ranks of one host, through shared memory.

Each rank writes its tensor into its slot and, once all have, reads everybody's
(parallel/host_turns.py): one wait, where a ring over TCP has 2 (size - 1). In a sum each rank adds
up everything itself, in the order of the ranks: the same bits on all.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from baton.parallel.group import Exchange, Group, even_rows
from baton.parallel.host_links import connect_on_host
from baton.parallel.host_turns import TURNS, HostTurns
from baton.parallel.layered_group import LayeredGroup
from baton.parallel.one_shot_exchange import OneShotExchange

LIMIT_BYTES = 4 << 20
"""The longest message that goes this way, but for all-to-alls, which go this way at any length.

bench/parallel.py, which prints from which size on Gloo is the faster way, finds none up to 32 MiB
on two ranks; on four, all-reduces of 32 MiB, where each rank reads four times as much as it sends.
So memory decides as well: the slots come to take 2 size LIMIT_BYTES. This holds 512 tokens of 2048
float32.
"""

_KNOWN_SHAPES = 256
_Shape = tuple[int, ...]


class OneShotGroup(LayeredGroup):
    """See Group; what is long, or made for one peer, goes to the group below."""

    def __init__(self, below: Group, turns: HostTurns) -> None:
        super().__init__(below)
        self._turns = turns
        self._limit = turns.limit
        self._slots_as = lru_cache(_KNOWN_SHAPES)(self._slots_of)

    @property
    def calls(self) -> int:
        """How many went this way."""
        return self._turns.calls

    def all_reduce_(self, x: Tensor) -> Tensor:
        """See Group."""
        if not 0 < x.nbytes <= self._limit:
            return self.below.all_reduce_(x)
        return _add(self._shared(x, (x.shape,) * self.size), x)

    def addends(self, x: Tensor) -> Sequence[Tensor]:
        """See Group: the slots, as they lie."""
        if not 0 < x.nbytes <= self._limit:
            return self.below.addends(x)
        return self._shared(x, (x.shape,) * self.size)

    def all_gather(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        rows = [x.shape[0]] * self.size if rows is None else rows
        width = x.shape[1:]
        if not 0 < max(rows) * math.prod(width) * x.itemsize <= self._limit:
            return self.below.all_gather(x, rows)
        return torch.cat(self._shared(x, tuple((n, *width) for n in rows)))

    def reduce_scatter(self, x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """See Group."""
        if not 0 < x.nbytes <= self._limit:
            return self.below.reduce_scatter(x, rows)
        rows = even_rows(x, self.size) if rows is None else rows
        first, own = sum(rows[: self.rank]), rows[self.rank]
        parts = self._shared(x, (x.shape,) * self.size)
        return _add([part[first : first + own] for part in parts], x.new_empty(own, *x.shape[1:]))

    def start_all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Exchange:
        """See Group."""
        return OneShotExchange(self._turns, x, sent, received)

    def leave(self) -> None:
        """Hang up on the peers: those that wait get RankLost."""
        self._turns.leave()

    def _shared(self, x: Tensor, shapes: tuple[_Shape, ...]) -> list[Tensor]:
        """Return what all ranks have shared in this call, of these shapes."""
        turns = self._turns
        parts, numbers = self._slots_as(turns.begin(), x.dtype, shapes)
        parts[self.rank].copy_(x)
        turns.meet((x.itemsize, numbers, 0))
        return parts

    def _slots_of(
        self, turn: int, dtype: torch.dtype, shapes: tuple[_Shape, ...]
    ) -> tuple[list[Tensor], int]:
        """Return all ranks' slots in a turn as such tensors, and how many numbers they are."""
        counts = [math.prod(shape) for shape in shapes]
        slots = self._turns.slots[turn]
        parts = [slots[i, : n * dtype.itemsize].view(dtype) for i, n in enumerate(counts)]
        return [part.view(s) for part, s in zip(parts, shapes, strict=True)], sum(counts)


def one_shot(
    below: Group, deadline_s: float, on_lost: Callable[[], None], limit_bytes: int = LIMIT_BYTES
) -> OneShotGroup | None:
    """Return a group that goes through shared memory, or None on ranks of several hosts."""
    links = connect_on_host(below, TURNS * below.size * limit_bytes, deadline_s)
    if links is None:
        return None
    turns = HostTurns(links, below, on_lost)
    turns.limit_waits(deadline_s)
    return OneShotGroup(below, turns)


def _add(parts: Sequence[Tensor], into: Tensor) -> Tensor:
    """Write the sum, one part after the other, and return it; short floats in float32."""
    if into.is_floating_point() and into.itemsize < 4 and len(parts) > 2:
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return into.copy_(total)
    torch.add(parts[0], parts[1], out=into)
    for part in parts[2:]:
        into += part
    return into
