"""Host blocks that hold the KV of preempted sequences, and the copies that the next step makes.

    preempted:  device blocks ──step.swap_out──▶ host blocks      all of a step's copies out come
    runs again: device blocks ◀──step.swap_in─── host blocks      before all of its copies in

Copies are only decided here; the executor makes them at the beginning of the step, before it
writes anything. Until then the device blocks that a copy reads must not be written by anybody
else: the scheduler grants nothing while a step with copies out is under way.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.ids import BlockId
from baton.engine.sequence import Sequence
from baton.engine.step import BlockCopy


@dataclass(frozen=True, slots=True)
class SwapStats:
    """Host blocks now, and blocks copied since the start."""

    total: int
    used: int
    copied_out: int
    copied_in: int


class SwapSpace:
    """The host blocks of one engine; there may be none."""

    def __init__(self, num_blocks: int, *, first: int = 0) -> None:
        """The blocks are numbered from `first`."""
        self._total = num_blocks
        self._first = first
        self._free = deque(BlockId(block) for block in range(first, first + num_blocks))
        self._held: dict[Sequence, tuple[BlockId, ...]] = {}
        self._out: list[BlockCopy] = []
        self._in: list[BlockCopy] = []
        self._next: list[Sequence] = []
        """Whose copies out the next step makes."""
        self._under_way: deque[list[Sequence]] = deque()
        """And each step under way, the oldest first."""
        self._copied_out = self._copied_in = 0

    def __repr__(self) -> str:
        return f"<SwapSpace {self._total - len(self._free)} of {self._total} used>"

    def put(self, seq: Sequence, table: Iterable[BlockId]) -> bool:
        """Let the next step copy the blocks of `table`; False if there is no room for them."""
        blocks = tuple(table)
        if len(blocks) > len(self._free):
            return False
        host = tuple(self._free.popleft() for _ in blocks)
        self._held[seq] = host
        self._out += map(BlockCopy, blocks, host)
        self._next.append(seq)
        return True

    def take(self, seq: Sequence, table: tuple[BlockId, ...], *, skip: int) -> None:
        """Let the next step copy back what `put` copied, but for the first `skip` blocks.

        The host blocks are free at once: the copies out of this step have been decided by now.
        """
        host = self._held[seq]
        self._in += map(BlockCopy, table[skip : len(host)], host[skip:])
        self.drop(seq)

    def drop(self, seq: Sequence) -> None:
        """Forget what `put` copied."""
        self._free += self._held.pop(seq)

    def step_copies(self) -> tuple[tuple[BlockCopy, ...], tuple[BlockCopy, ...]]:
        """Return the copies out and in that the step about to begin has to make."""
        out, back = tuple(self._out), tuple(self._in)
        self._out.clear()
        self._in.clear()
        self._under_way.append(self._next)
        self._next = []
        self._copied_out += len(out)
        self._copied_in += len(back)
        return out, back

    def step_ended(self, *, copied: bool) -> list[Sequence]:
        """End the oldest step; return the sequences whose copies out are worth nothing."""
        leaving = self._under_way.popleft()
        return [] if copied else [seq for seq in leaving if seq in self._held]

    def no_step(self) -> list[Sequence]:
        """Give up the copies that the next step would make; return whose were to go out."""
        leaving, self._next = self._next, []
        self._out.clear()
        self._in.clear()
        return [seq for seq in leaving if seq in self._held]

    def is_leaving(self, seq: Sequence) -> bool:
        """Whether a step under way makes its copies out."""
        return any(seq in leaving for leaving in self._under_way)

    def stats(self) -> SwapStats:
        """Return a snapshot."""
        used = self._total - len(self._free)
        return SwapStats(self._total, used, self._copied_out, self._copied_in)

    def check(self, swapped: Iterable[Sequence]) -> None:
        """Assert that exactly these sequences hold the host blocks that are not free."""
        held = [block for blocks in self._held.values() for block in blocks]
        numbers = range(self._first, self._first + self._total)
        assert sorted([*held, *self._free]) == list(numbers), repr(self)
        assert set(self._held) == set(swapped), "a host block has no owner"
        assert not self._next
        assert not self._out
        assert not self._in
