import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.core.errors import InvalidConfig
from baton.core.handover import BlockRef
from baton.core.ids import BlockId, Epoch
from baton.engine.block_pool import BlockPool, PoolStats


def ids(refs: tuple[BlockRef, ...] | None) -> list[int]:
    assert refs is not None
    return [ref.block for ref in refs]


def test_allocates_all_or_nothing():
    pool = BlockPool(3)
    first = pool.allocate(2)
    assert first is not None
    assert pool.allocate(2) is None
    assert pool.stats() == PoolStats(total=3, used=2, cached=0, free=1, fencing=0)
    pool.release(first)
    assert pool.stats() == PoolStats(total=3, used=0, cached=0, free=3, fencing=0)
    pool.check()


def test_zero_blocks_are_always_there():
    pool = BlockPool(1)
    pool.allocate(1)
    assert pool.allocate(0) == ()


def test_oldest_freed_is_used_first():
    pool = BlockPool(4)
    refs = pool.allocate(4)
    assert refs is not None
    freed = [refs[index] for index in (2, 0, 1, 3)]
    for ref in freed:
        pool.release([ref])
    assert ids(pool.allocate(1)) == [freed[0].block]
    assert ids(pool.allocate(3)) == [ref.block for ref in freed[1:]]


def test_epoch_rises_when_a_block_is_freed_and_only_then():
    pool = BlockPool(1)
    (ref,) = pool.allocate(1) or ()
    assert ref.epoch == 0
    pool.retain([ref])
    pool.release([ref])
    assert pool.is_current(ref)
    pool.release([ref])
    assert not pool.is_current(ref)
    (again,) = pool.allocate(1) or ()
    assert again == BlockRef(ref.block, Epoch(1))
    assert pool.is_current(again)
    assert not pool.is_current(ref)


def test_a_fenced_block_is_not_reused_until_the_fence_has_passed():
    pool = BlockPool(1)
    refs = pool.allocate(1)
    assert refs is not None
    pool.fence(refs)
    assert pool.stats() == PoolStats(total=1, used=0, cached=0, free=0, fencing=1)
    assert not pool.is_current(refs[0])
    assert pool.allocate(1) is None
    pool.fence_passed(refs)
    assert pool.allocate(1) == (BlockRef(BlockId(0), Epoch(1)),)
    pool.check()


def test_a_shared_block_cannot_be_fenced():
    pool = BlockPool(1)
    refs = pool.allocate(1)
    assert refs is not None
    pool.retain(refs)
    with pytest.raises(AssertionError, match="2 references"):
        pool.fence(refs)


@pytest.mark.parametrize("action", ["retain", "release", "fence"])
def test_a_stale_reference_is_a_bug(action: str):
    pool = BlockPool(2)
    refs = pool.allocate(1)
    assert refs is not None
    pool.release(refs)
    with pytest.raises(AssertionError, match="stale"):
        getattr(pool, action)(refs)


def test_a_reference_to_no_block_is_not_current():
    pool = BlockPool(2)
    pool.allocate(2)
    for block in (-1, 2, 1 << 40):
        assert not pool.is_current(BlockRef(BlockId(block), Epoch(0)))


def test_a_pool_has_blocks():
    with pytest.raises(InvalidConfig, match="num_blocks: 0 is not allowed"):
        BlockPool(0)


def test_check_finds_a_lost_and_a_doubled_block():
    pool = BlockPool(2)
    block = pool._free.pop()
    with pytest.raises(AssertionError):
        pool.check()
    pool._free += [block, block]
    with pytest.raises(AssertionError):
        pool.check()


def test_a_kept_block_outlives_its_references_with_its_epoch():
    pool = BlockPool(2)
    (ref,) = pool.allocate(1) or ()
    pool.keep(ref)
    pool.release([ref])
    assert pool.stats() == PoolStats(total=2, used=0, cached=1, free=1, fencing=0)
    assert pool.is_current(ref)
    pool.retain([ref])
    assert pool.stats() == PoolStats(total=2, used=1, cached=0, free=1, fencing=0)
    pool.release([ref])
    pool.check()


def test_the_end_of_the_longest_unused_prefix_is_evicted_first():
    evicted: list[int] = []
    pool = BlockPool(5, on_evict=evicted.append)
    first, second = pool.allocate(2) or (), pool.allocate(3) or ()
    for ref in (*first, *second):
        pool.keep(ref)
    pool.release(first)
    pool.release(second)
    pool.retain(first[:1])  # used again: now it is the youngest
    pool.release(first[:1])
    pool.allocate(5)
    assert evicted == [*ids(first[1:]), *ids(second)[::-1], *ids(first[:1])]
    assert not any(map(pool.is_current, first + second))
    pool.check()


def test_room_does_not_count_what_is_about_to_be_retained():
    pool = BlockPool(3)
    refs = pool.allocate(2) or ()
    pool.keep(refs[0])
    pool.keep(refs[1])
    pool.release(refs[:1])
    assert pool.room() == 2
    assert pool.room(besides=refs) == 1  # the other one is in use, and no room anyway


class Pool(RuleBasedStateMachine):
    """Against a model that keeps references as a plain list, and cached blocks in order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5, on_evict=self.evict)
        self.held: list[BlockRef] = []
        self.fenced: list[BlockRef] = []
        self.kept: set[BlockRef] = set()
        self.cached: list[BlockRef] = []
        self.past: set[BlockRef] = set()

    def evict(self, block: BlockId) -> None:
        ref = self.cached.pop(0)
        assert ref.block == block
        self.kept.remove(ref)
        self.past.add(ref)

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        room = 5 - len({r.block for r in self.held}) - len(self.fenced)
        assert self.pool.room() == room
        refs = self.pool.allocate(count)
        assert (refs is None) == (count > room)
        for ref in refs or ():
            assert ref not in self.past, "an epoch came back"
            assert ref.block not in {r.block for r in self.held + self.fenced + self.cached}
            self.held.append(ref)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.held))
        self.pool.keep(ref)
        self.kept.add(ref)

    @precondition(lambda self: self.held + self.cached)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.held + self.cached))
        self.pool.retain([ref])
        self.held.append(ref)
        if ref in self.cached:
            self.cached.remove(ref)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.held))
        self.pool.release([ref])
        self.held.remove(ref)
        if ref not in self.held:
            if ref in self.kept:
                self.cached.append(ref)
            else:
                self.past.add(ref)

    def fenceable(self) -> list[BlockRef]:
        return [r for r in self.held if self.held.count(r) == 1 and r not in self.kept]

    @precondition(lambda self: self.fenceable())
    @rule(data=st.data())
    def fence(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.fenceable()))
        self.pool.fence([ref])
        self.held.remove(ref)
        self.fenced.append(ref)

    @precondition(lambda self: self.fenced)
    @rule()
    def fence_passed(self) -> None:
        ref = self.fenced.pop()
        self.pool.fence_passed([ref])
        self.past.add(ref)

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert all(self.pool.is_current(ref) for ref in self.held + self.cached)
        assert not any(self.pool.is_current(ref) for ref in [*self.past, *self.fenced])
        assert all(self.pool.references(ref) == self.held.count(ref) for ref in self.held)
        assert self.pool.cached() == tuple(ref.block for ref in self.cached)
        stats = self.pool.stats()
        assert stats.used == len(set(self.held))
        assert stats.fencing == len(self.fenced)
        assert stats.used + stats.cached + stats.free + stats.fencing == stats.total == 5
        assert stats.available == self.pool.room()


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
