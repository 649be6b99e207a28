"""An uneven all-to-all among the ranks of one host, through shared memory.

Each rank lets its rows pass through its slot, as many bytes at a time as that has, and says where
among them each peer's are. How many times the slots are filled nobody knows before, since rows are
uneven; but everyone hears with the first filling how much there is to come from whom.

    rank 0   [ to 0 │ to 1     │ to 2 ]          "yours begin and end here; all are so many"
                   └─ slot ─┘└─ slot ─┘

Own rows are copied where they go at once. Nothing is padded: what was sent arrives, to the bit.
"""

import math
from collections.abc import Sequence
from ctypes import memmove
from itertools import accumulate

from torch import Tensor

from baton.parallel.host_turns import HostTurns


class OneShotExchange:
    """See Exchange: the slot is written when it is made, and the others' are read in `wait`."""

    def __init__(
        self, turns: HostTurns, x: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> None:
        assert sum(sent) == x.shape[0], f"{sent} of {x.shape[0]} rows"
        rank, row = turns.rank, math.prod(x.shape[1:]) * x.itemsize
        assert sent[rank] == received[rank], f"{sent} and {received} at {rank}"
        self._turns = turns
        self._x = x
        self._output = x.new_empty(sum(received), *x.shape[1:])
        self._from = (0, *accumulate(count * row for count in sent))
        """Bytes of x, by rank that they go to; and their end."""
        self._into = (0, *accumulate(count * row for count in received))
        """Bytes of the output, by rank that they come from; and their end."""
        mine = self._output.data_ptr() + self._into[rank]
        memmove(mine, x.data_ptr() + self._from[rank], sent[rank] * row)
        self._slots = 0
        """Address of the first slot of the turn."""
        self._fill(0)

    def wait(self) -> Tensor:
        """See Exchange."""
        turns, most, start = self._turns, self._from[-1], 0
        while True:
            for place in turns.peers:
                begin, end, total = turns.hear(place)
                self._take(place, begin, end, start)
                most = max(most, total)
            turns.end()
            start += turns.limit
            if start >= most:
                return self._output
            self._fill(start)

    def _fill(self, start: int) -> None:
        """Write what of x from byte `start` on has room to the own slot, and tell all peers."""
        turns = self._turns
        self._slots = turns.slots.data_ptr() + turns.begin() * turns.size * turns.limit
        slot, x = self._slots + turns.rank * turns.limit, self._x.data_ptr()
        for place in turns.peers:
            begin, end = self._from[place], self._from[place + 1]
            first, last = max(begin, start), min(end, start + turns.limit)
            if first < last:
                memmove(slot + first - start, x + first, last - first)
        for place in turns.peers:
            turns.tell(place, (self._from[place], self._from[place + 1], self._from[-1]))

    def _take(self, place: int, begin: int, end: int, start: int) -> None:
        """Read what is for this rank of a peer's bytes from `start` on."""
        turns, into = self._turns, self._into[place]
        expected = self._into[place + 1] - into
        assert end - begin == expected, f"{end - begin} bytes of rank {place}, not {expected}"
        first, last = max(begin, start), min(end, start + turns.limit)
        if first < last:
            target = self._output.data_ptr() + into + first - begin
            memmove(target, self._slots + place * turns.limit + first - start, last - first)
