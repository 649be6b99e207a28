"""The KV memory of a whole engine: one part of the pool, or several that share nothing.

Where attention is data-parallel, every place along that axis computes sequences of its own, and
has their KV:

    blocks 0 … n-1 │ blocks n … 2n-1 │ …          one KVMemory each
    partition 0    │ partition 1     │

A sequence has all its blocks in one partition. It gets one with its first blocks, and another one
perhaps if it is preempted and not swapped. A sequence without blocks may go anywhere: to where the
most of its prefix is cached, and of these to where the fewest sequences are.
"""

from collections.abc import Iterable
from dataclasses import astuple

from baton.core.config import EngineConfig
from baton.core.errors import InvalidConfig
from baton.core.handover import BlockRef
from baton.core.ids import BlockId, SeqId
from baton.core.request import GenerateRequest
from baton.engine.block_pool import PoolStats
from baton.engine.kv_events import KVEvents
from baton.engine.kv_memory import KVMemory, MemoryStats
from baton.engine.sequence import Sequence
from baton.engine.step import BlockCopy
from baton.engine.swap_space import SwapStats

_Copies = tuple[BlockCopy, ...]


class Partitions:
    """What KVMemory does, in the partition that the sequence is in or is found for it."""

    def __init__(
        self, config: EngineConfig, num_blocks: int, host_blocks: int, partitions: int
    ) -> None:
        """Both pools are cut into equal parts; raises InvalidConfig if they cannot be."""
        for name, blocks in (("num_blocks", num_blocks), ("host_blocks", host_blocks)):
            if blocks % partitions:
                raise InvalidConfig(name, blocks, f"a multiple of {partitions}, for as many ranks")
        self._size = num_blocks // partitions
        self._parts = [
            KVMemory(config, self._size, host_blocks // partitions, partition=part)
            for part in range(partitions)
        ]
        self._sequences = [0] * partitions
        """How many have blocks in each."""

    def __repr__(self) -> str:
        return f"<Partitions {self._parts}>"

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may have: a partition's room."""
        return self._parts[0].capacity

    def partition_of(self, block: BlockId) -> int:
        """Return the partition that a block belongs to."""
        return block // self._size

    # Blocks for sequences; see the methods of the same names in engine/kv_memory.py

    def take(self, seq: Sequence, tokens: int, budget: int) -> bool:
        """Give `seq` room for `tokens` in one partition, or change nothing."""
        return any(
            self._parts[part].take(seq, tokens, budget) and self._entered(seq, part)
            for part in self._candidates(seq)
        )

    def take_prompt(self, seq: Sequence) -> bool:
        """Give `seq` blocks for its prompt in one partition, or change nothing."""
        return any(
            self._parts[part].take_prompt(seq) and self._entered(seq, part)
            for part in self._candidates(seq)
        )

    def take_cached(self, seq: Sequence, blocks: int) -> None:
        """Give `seq` what a cache has of its first `blocks` blocks, perhaps none."""
        part = self._candidates(seq)[0]
        self._parts[part].take_cached(seq, blocks)
        if seq.blocks:
            self._entered(seq, part)

    def take_one(self, seq: Sequence) -> bool:
        """Give `seq` one more block of its partition, if there is one."""
        return self._of(seq).take_one(seq)

    def admitted(self, seq: Sequence) -> None:
        """Take note that a prompt was handed over, before its `commit`."""
        self._of(seq).admitted(seq)

    def commit(self, seq: Sequence) -> None:
        """Let the partition's cache have what is computed and full."""
        self._of(seq).commit(seq)

    def preempt(self, seq: Sequence) -> None:
        """Take all blocks of `seq`, which runs again: in this partition, if what it has is kept."""
        self._of(seq).preempt(seq)
        self._left(seq)

    def give_back(self, seq: Sequence) -> None:
        """Take all blocks of `seq`, and what is kept of it in host memory."""
        if seq.partition is None:
            return
        had_blocks = bool(seq.blocks)
        self._of(seq).give_back(seq)
        if had_blocks:
            self._left(seq)

    def fence(self, seq: Sequence) -> None:
        """Take all blocks of `seq`; into those that it does not share, reads may still write."""
        self._of(seq).fence(seq)
        self._left(seq)

    def fence_passed(self, seq_id: SeqId) -> None:
        """Free what `fence` took, if anything."""
        for part in self._parts:
            part.fence_passed(seq_id)

    # Steps

    def step_copies(self) -> tuple[_Copies, _Copies]:
        """Return the copies out and in that the step about to begin has to make."""
        copies = [part.step_copies() for part in self._parts]
        out, back = zip(*copies, strict=True)
        return sum(out, ()), sum(back, ())

    def step_ended(self, *, copied: bool) -> None:
        """End the oldest step."""
        for part in self._parts:
            part.step_ended(copied=copied)

    def no_step(self) -> None:
        """There is no next step yet."""
        for part in self._parts:
            part.no_step()

    # What there is

    def known_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens of a prompt, from the first, the best of the caches has now."""
        return max(part.known_tokens(request) for part in self._parts)

    def is_current(self, ref: BlockRef) -> bool:
        """Whether the block has been used or cached without a break since `ref` was made."""
        return self._parts[self.partition_of(ref.block)].is_current(ref)

    def drain_events(self) -> tuple[KVEvents, ...]:
        """Return what each partition's cache gained and lost; see engine/kv_events.py."""
        return tuple(part.drain_events() for part in self._parts)

    def cached_hashes(self) -> tuple[Iterable[bytes], ...]:
        """Return the hashes of all prefixes that each partition's cache has now."""
        return tuple(part.cached_hashes() for part in self._parts)

    def stats(self) -> MemoryStats:
        """Return a snapshot, summed up over the partitions."""
        found = [part.stats() for part in self._parts]
        pools, swaps = [s.pool for s in found], [s.swap for s in found]
        return MemoryStats(
            PoolStats(*(sum(numbers) for numbers in zip(*map(_fields, pools), strict=True))),
            sum(s.prompt_tokens for s in found),
            sum(s.cached_tokens for s in found),
            SwapStats(*(sum(numbers) for numbers in zip(*map(_fields, swaps), strict=True))),
        )

    def check(self, owners: Iterable[Sequence]) -> None:
        """Assert that every partition's books balance, and that nobody is in two of them."""
        found = list(owners)
        for number, part in enumerate(self._parts):
            mine = [seq for seq in found if seq.partition == number]
            part.check(mine)
            assert self._sequences[number] == sum(bool(seq.blocks) for seq in mine)
        for seq in found:
            assert not seq.blocks or seq.partition is not None, f"{seq} is nowhere"
            assert {self.partition_of(b) for b in seq.table} <= {seq.partition}, seq

    # How

    def _candidates(self, seq: Sequence) -> list[int]:
        """Return the partitions that `seq` may go to, the best first."""
        if seq.swapped or len(self._parts) == 1:
            return [seq.partition or 0]
        cached = [part.cached_blocks(seq) for part in self._parts]
        order = range(len(self._parts))
        return sorted(order, key=lambda part: (-cached[part], self._sequences[part], part))

    def _of(self, seq: Sequence) -> KVMemory:
        assert seq.partition is not None, f"{seq} has no partition"
        return self._parts[seq.partition]

    def _entered(self, seq: Sequence, part: int) -> bool:
        seq.partition = part
        self._sequences[part] += 1
        return True

    def _left(self, seq: Sequence) -> None:
        assert seq.partition is not None, f"{seq} has no partition"
        self._sequences[seq.partition] -= 1


def _fields(stats: PoolStats | SwapStats) -> tuple[int, ...]:
    """Return the numbers of a snapshot, in the order of its fields."""
    numbers: tuple[int, ...] = astuple(stats)
    return numbers
