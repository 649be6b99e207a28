"""The KV blocks of one engine: who may write where, and which references are still good.

                allocate                 release (last reference)
         ┌─────────────────────▶ used ──────────────────────────────▶ free, epoch + 1
       free                     ▲ │  │                                ▲   ▲
         ▲                retain│ │  │ fence                          │   │
         │                      │ ▼  ▼                                │   │
         │      kept blocks: cached  fencing ──fence_passed───────────┘   │
         │                      └──evicted, the longest unused first──────┘
         └── oldest freed is allocated first, so that a late read finds an epoch that is gone
             long before it could find foreign KV

A block being fenced belongs to nobody, but a read under way may still write it. A block that is
kept holds KV that somebody may want again: without references it stays, as it is and with its
epoch, until its room is needed.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from baton.core.errors import InvalidConfig
from baton.core.handover import BlockRef
from baton.core.ids import BlockId, Epoch


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Blocks by state; the four states add up to `total`."""

    total: int
    used: int
    cached: int
    """Without a reference, with KV that may be wanted again; as good as free."""
    free: int
    fencing: int

    @property
    def available(self) -> int:
        """Blocks that can be allocated: free or cached."""
        return self.free + self.cached


class BlockPool:
    """Reference-counted blocks with epochs; every operation costs what it touches."""

    def __init__(
        self,
        num_blocks: int,
        *,
        first: int = 0,
        on_evict: Callable[[BlockId], None] = lambda _: None,
    ) -> None:
        """The blocks are numbered from `first`; `on_evict` is told of each kept block whose room
        is taken.
        """
        if num_blocks < 1:
            raise InvalidConfig("num_blocks", num_blocks, "1 or more")
        self._on_evict = on_evict
        self._free = deque(BlockId(block) for block in range(first, first + num_blocks))
        self._references: dict[BlockId, int] = {}
        self._kept: set[BlockId] = set()
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        self._fencing: set[BlockId] = set()
        self._epochs = dict.fromkeys(self._free, Epoch(0))

    def __repr__(self) -> str:
        s = self.stats()
        return (
            f"<BlockPool {s.used} used, {s.cached} cached, {s.free} free, {s.fencing} fencing "
            f"of {s.total}>"
        )

    def __len__(self) -> int:
        return len(self._epochs)

    def room(self, *, besides: Iterable[BlockRef] = ()) -> int:
        """Return how many blocks can be allocated once `besides` have been retained."""
        retained = sum(ref.block in self._cached for ref in besides)
        return len(self._free) + len(self._cached) - retained

    def allocate(self, count: int) -> tuple[BlockRef, ...] | None:
        """Take `count` free or cached blocks with one reference each; None if there are fewer."""
        if count > len(self._free) + len(self._cached):
            return None
        while len(self._free) < count:
            self._evict()
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return tuple(BlockRef(block, self._epochs[block]) for block in blocks)

    def retain(self, refs: Iterable[BlockRef]) -> None:
        """Add a reference to each of these used or cached blocks."""
        for ref in refs:
            assert self.is_current(ref), f"{ref} is stale"
            self._cached.pop(ref.block, None)
            self._references[ref.block] = self._references.get(ref.block, 0) + 1

    def keep(self, ref: BlockRef) -> None:
        """Say that this used block holds KV which may be wanted again: it will be cached."""
        assert self.is_current(ref), f"{ref} is stale"
        assert ref.block in self._references, f"{ref} is not in use"
        self._kept.add(ref.block)

    def release(self, refs: Sequence[BlockRef]) -> None:
        """Drop a reference to each of these used blocks, the last one first.

        With its last reference a block is free, or cached if it is kept. The blocks of a prefix
        come in its order, so that their ends are evicted before their beginnings.
        """
        for ref in reversed(refs):
            assert self.is_current(ref), f"{ref} is stale"
            self._references[ref.block] -= 1
            if self._references[ref.block] == 0:
                del self._references[ref.block]
                if ref.block in self._kept:
                    self._cached[ref.block] = None
                else:
                    self._set_free(ref.block)

    def fence(self, refs: Iterable[BlockRef]) -> None:
        """Drop the only reference to each of these blocks, which may still be written for a while.

        A block into which KV is being read has one owner: it is shared only once it is complete.
        """
        for ref in refs:
            assert self.is_current(ref), f"{ref} is stale"
            references = self._references.pop(ref.block)
            assert references == 1, f"{ref} has {references} references and cannot be fenced"
            assert ref.block not in self._kept, f"{ref} is kept and cannot be fenced"
            self._fencing.add(ref.block)

    def fence_passed(self, refs: Iterable[BlockRef]) -> None:
        """Free these fenced blocks: nothing can write them any more."""
        for ref in refs:
            assert self._epochs[ref.block] == ref.epoch, f"{ref} is stale"
            self._fencing.remove(ref.block)
            self._set_free(ref.block)

    def references(self, ref: BlockRef) -> int:
        """Return how many references there are to a block."""
        return self._references.get(ref.block, 0) if self.is_current(ref) else 0

    def is_current(self, ref: BlockRef) -> bool:
        """Whether the block has been used or cached without a break since `ref` was made."""
        present = ref.block in self._references or ref.block in self._cached
        return present and self._epochs[ref.block] == ref.epoch

    def stats(self) -> PoolStats:
        """Return how many blocks are in which state."""
        return PoolStats(
            total=len(self._epochs),
            used=len(self._references),
            cached=len(self._cached),
            free=len(self._free),
            fencing=len(self._fencing),
        )

    def check(self) -> None:
        """Assert that every block is in exactly one state and every reference count is positive."""
        states = [*self._free, *self._references, *self._cached, *self._fencing]
        assert sorted(states) == list(self._epochs), f"{self!r}: states {states}"
        assert all(count > 0 for count in self._references.values()), self._references
        assert self._kept >= self._cached.keys(), "a cached block is not kept"
        assert self._kept <= self._cached.keys() | self._references.keys(), "kept, but gone"

    def cached(self) -> tuple[BlockId, ...]:
        """Return the cached blocks in the order in which they are evicted."""
        return tuple(self._cached)

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        self._kept.remove(block)
        self._set_free(block)
        self._on_evict(block)

    def _set_free(self, block: BlockId) -> None:
        self._epochs[block] = Epoch(self._epochs[block] + 1)
        self._free.append(block)
