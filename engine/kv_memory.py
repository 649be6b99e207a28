"""The KV memory of sequences: blocks of one part of the pool, shared through the prefix cache.

A sequence's block table, from its first block on:

    │ committed: in the prefix cache, read by any number of sequences │ its own: written by it │
    0                                             committed × block_size   ≤   computed

A block is committed once it is full and computed. Writes go to `computed` and after, so a shared
block is never written, and there is nothing to copy on write. Whoever commits a prefix that is
already there takes over the block that holds it and gives its own back: so a sequence that holds
a block of the cache also holds all blocks before it, and ends are always evicted first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.config import EngineConfig
from baton.core.handover import BlockRef
from baton.core.ids import SeqId
from baton.core.request import GenerateRequest
from baton.engine.block_pool import BlockPool, PoolStats
from baton.engine.kv_events import KVEvents
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Sequence
from baton.engine.step import BlockCopy
from baton.engine.swap_space import SwapSpace, SwapStats


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Blocks now, and prompt tokens since the start."""

    pool: PoolStats
    prompt_tokens: int
    """Of prompts that began to be computed here, or were handed over."""
    cached_tokens: int
    """Of these, found in the prefix cache."""
    swap: SwapStats


class KVMemory:
    """Gives blocks to sequences and takes them back."""

    def __init__(
        self, config: EngineConfig, num_blocks: int, host_blocks: int, *, partition: int = 0
    ) -> None:
        """Blocks are numbered over all partitions, each of which has as many."""
        first = partition * num_blocks
        self._block_size = config.block_size
        self._swap_block_cost = config.swap_block_cost
        self._swap = SwapSpace(host_blocks, first=partition * host_blocks)
        self._cache: PrefixCache | None = None
        if config.prefix_cache:
            self._cache = PrefixCache(config.block_size, config.prefix_hash)
            self._pool = BlockPool(num_blocks, first=first, on_evict=self._cache.forget)
        else:
            self._pool = BlockPool(num_blocks, first=first)
        self._fenced: dict[SeqId, tuple[BlockRef, ...]] = {}
        self._prompt_tokens = self._cached_tokens = 0

    def __repr__(self) -> str:
        return f"<KVMemory {self._pool!r}, {self._cache!r}>"

    @property
    def capacity(self) -> int:
        """Tokens whose KV fits into the pool."""
        return len(self._pool) * self._block_size

    def take(self, seq: Sequence, tokens: int, budget: int) -> bool:
        """Give `seq` room for `tokens`: what the cache has of it, and fresh blocks for the rest.

        The next step copies what is in host memory into these. False, and nothing has changed, if
        blocks are lacking, or if `budget` tokens are too few for a first chunk.
        """
        if seq.swapped and self._swap.is_leaving(seq):
            return False  # the copy may yet fail
        if self._pool.room() < self._blocks_for(tokens) - self._shareable(seq):
            return False  # whatever the cache has; most often this is all that is to be said
        shared = self._find(seq)
        start = max(len(shared) * self._block_size, seq.swapped)
        if seq.chunk_end(start, budget, self._block_size) <= start:
            return False
        if not self._attach(seq, shared, tokens, start):
            return False
        self._count(seq, start)
        if seq.swapped:
            self._swap.take(seq, seq.table, skip=len(shared))
            seq.swapped = 0
        return True

    def take_prompt(self, seq: Sequence) -> bool:
        """Give `seq` blocks for its prompt, or change nothing.

        What the cache has of it comes first, committed; KV may be read into the others.
        """
        if self._pool.room() < self._blocks_for(seq.prompt_len) - self._shareable(seq):
            return False
        shared = self._find(seq)
        return self._attach(seq, shared, seq.prompt_len, len(shared) * self._block_size)

    def _attach(self, seq: Sequence, shared: list[BlockRef], tokens: int, computed: int) -> bool:
        """Make `seq` hold cached blocks, and fresh ones up to `tokens`; or change nothing."""
        need = self._blocks_for(tokens) - len(shared)
        if self._pool.room(besides=shared) < need:
            return False
        self._pool.retain(shared)
        fresh = self._pool.allocate(need)
        assert fresh is not None
        seq.extend((*shared, *fresh))
        seq.committed, seq.computed, seq.planned = len(shared), computed, computed
        return True

    def admitted(self, seq: Sequence) -> None:
        """Take note that `seq`, whose prompt was handed over, runs here; before its `commit`."""
        self._count(seq, seq.committed * self._block_size)

    def take_cached(self, seq: Sequence, blocks: int) -> None:
        """Give `seq` what the cache has of its first `blocks` blocks, perhaps none."""
        shared = self._find(seq)[:blocks]
        self._pool.retain(shared)
        seq.extend(tuple(shared))
        seq.committed = len(shared)
        seq.computed = seq.planned = len(shared) * self._block_size

    def take_one(self, seq: Sequence) -> bool:
        """Give `seq` one more block, if there is one."""
        fresh = self._pool.allocate(1)
        if fresh is None:
            return False
        seq.extend(fresh)
        return True

    def cached_blocks(self, seq: Sequence) -> int:
        """Return how many blocks of `seq`, from the first, the cache has now."""
        return len(self._find(seq))

    def known_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens of a prompt, from the first, the cache has now."""
        if self._cache is None:
            return 0
        full = (len(request.prompt) - 1) // self._block_size
        root = self._cache.root(request.tenant)
        hashes = self._cache.hashes(request.prompt[: full * self._block_size], root)
        return len(self._cache.match(hashes)) * self._block_size

    def commit(self, seq: Sequence) -> None:
        """Let the cache have what is computed and full.

        While a step uses `seq`'s blocks, none is exchanged: then all ends where the cache has
        another block with the same KV, and `seq.twin` says so.
        """
        full = seq.computed // self._block_size
        if self._cache is None or full == seq.committed:
            return
        hashes = self._hash(self._cache, seq, full)
        for index in range(seq.committed, full):
            parent = hashes[index - 1] if index else self._cache.root(seq.request.tenant)
            mine = seq.blocks[index]
            kept = self._cache.insert(hashes[index], parent, mine)
            seq.twin = kept != mine and seq.in_steps > 0 and not seq.hold
            if seq.twin:
                seq.committed = index
                return
            if kept == mine:
                self._pool.keep(mine)
            else:
                self._pool.retain([kept])
                seq.replace(index, kept)
                if seq.hold:
                    seq.offered += (mine,)
                else:
                    self._pool.release([mine])
        seq.committed = full

    def give_back(self, seq: Sequence) -> None:
        """Take all blocks of `seq`; those that are committed stay in the cache."""
        self._forget_swapped(seq)
        offered, seq.offered = seq.offered, ()
        self._pool.release(offered)
        self._pool.release(seq.drop_blocks())

    def preempt(self, seq: Sequence) -> None:
        """Take all blocks of `seq`, which will run again: what it has is copied to the host first,
        if there is room and if computing it again would take longer.

        How much of it the cache will still have then, nobody knows; memory is short, so: nothing.
        """
        assert not seq.in_steps, f"{seq} is in a step"
        computed, table = seq.computed, seq.table[: self._blocks_for(seq.computed)]
        worth_it = 2 * len(table) * self._swap_block_cost < computed
        if worth_it and self._swap.put(seq, table):
            seq.swapped = computed
        self._pool.release(seq.drop_blocks())

    def step_copies(self) -> tuple[tuple[BlockCopy, ...], tuple[BlockCopy, ...]]:
        """Return the copies out and in that the step about to begin has to make."""
        return self._swap.step_copies()

    def step_ended(self, *, copied: bool) -> None:
        """End the oldest step; what it did not copy, if it did not, is computed again."""
        for seq in self._swap.step_ended(copied=copied):
            self._forget_swapped(seq)

    def no_step(self) -> None:
        """There is no next step yet to make the copies: what they were for is computed again."""
        for seq in self._swap.no_step():
            self._forget_swapped(seq)

    def fence(self, seq: Sequence) -> None:
        """Take all blocks of `seq`; into those that it does not share, reads may still write."""
        shared = seq.committed
        blocks = seq.drop_blocks()
        self._pool.release(blocks[:shared])
        self._fenced[seq.seq_id] = blocks[shared:]
        self._pool.fence(blocks[shared:])

    def fence_passed(self, seq_id: SeqId) -> None:
        """Free what `fence` took, if anything."""
        self._pool.fence_passed(self._fenced.pop(seq_id, ()))

    def is_current(self, ref: BlockRef) -> bool:
        """Whether the block has been used or cached without a break since `ref` was made."""
        return self._pool.is_current(ref)

    def drain_events(self) -> KVEvents:
        """Return what the cache gained and lost; see engine/kv_events.py."""
        if self._cache is None:
            return KVEvents(0, complete=True, events=())
        return self._cache.drain_events()

    def cached_hashes(self) -> Iterable[bytes]:
        """Return the hashes of all prefixes that the cache has now."""
        return () if self._cache is None else self._cache.hashes_there()

    def stats(self) -> MemoryStats:
        """Return a snapshot."""
        return MemoryStats(
            self._pool.stats(), self._prompt_tokens, self._cached_tokens, self._swap.stats()
        )

    def check(self, owners: list[Sequence]) -> None:
        """Assert that `owners` hold every used block, and share none but committed ones."""
        self._pool.check()
        self._swap.check(seq for seq in owners if seq.swapped)
        holders: dict[BlockRef, int] = {}
        for seq in owners:
            assert seq.table == tuple(ref.block for ref in seq.blocks), seq
            assert seq.computed <= len(seq.blocks) * self._block_size, seq
            assert seq.committed * self._block_size <= seq.computed, f"{seq} writes a shared block"
            assert seq.computed <= seq.planned, f"{seq} is ahead of its plans"
            assert seq.computed == seq.planned or seq.in_steps, f"{seq} lost a step"
            for ref in (*seq.blocks, *seq.offered):
                holders[ref] = holders.get(ref, 0) + 1
            own = seq.blocks[seq.committed :]
            assert all(self._pool.references(ref) == 1 for ref in own), f"{seq} shares its own"
        for ref, count in holders.items():
            assert self._pool.references(ref) == count, f"{ref} has {count} owners"
        pool = self._pool.stats()
        assert len(holders) == pool.used, "a block has no owner"
        assert sum(map(len, self._fenced.values())) == pool.fencing, "a fenced block has no owner"
        self._check_cache(owners)

    def _check_cache(self, owners: list[Sequence]) -> None:
        if self._cache is None:
            assert self._pool.stats().cached == 0, "a cached block without a cache"
            return
        indexed = self._cache.blocks()
        self._cache.check(self._pool.cached())
        assert indexed >= set(self._pool.cached()), "a cached block that cannot be found"
        for seq in owners:
            assert indexed.issuperset(seq.table[: seq.committed]), f"{seq} lost a shared block"
            assert indexed.isdisjoint(seq.table[seq.committed :]), f"{seq} writes a cached block"

    def _find(self, seq: Sequence) -> list[BlockRef]:
        """Return the cached blocks of the longest known prefix."""
        if self._cache is None:
            return []
        full = self._shareable(seq)
        return self._cache.match(self._hash(self._cache, seq, full)[:full])

    def _shareable(self, seq: Sequence) -> int:
        """Return how many blocks a cache could have: the last token's logits are always wanted."""
        return (len(seq.tokens) - 1) // self._block_size

    def _hash(self, cache: PrefixCache, seq: Sequence, blocks: int) -> list[bytes]:
        """Return the chained hashes of at least the first `blocks` blocks."""
        known = len(seq.hashes)
        if known < blocks:
            parent = seq.hashes[-1] if known else cache.root(seq.request.tenant)
            tokens = seq.tokens[known * self._block_size : blocks * self._block_size]
            seq.hashes += cache.hashes(tokens, parent)
        return seq.hashes

    def _forget_swapped(self, seq: Sequence) -> None:
        if seq.swapped:
            self._swap.drop(seq)
            seq.swapped = 0

    def _count(self, seq: Sequence, cached: int) -> None:
        if seq.cached_tokens is None:
            seq.cached_tokens = cached
            self._prompt_tokens += seq.prompt_len
            self._cached_tokens += cached

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)
