"""The index of prefixes, and what it tells the router."""

import pytest

from baton.core.handover import BlockRef
from baton.core.ids import BlockId, Epoch
from baton.engine.kv_events import BlockRemoved, BlockStored, KVEventLog
from baton.engine.prefix_cache import PrefixCache

TOKENS = list(range(40))


@pytest.fixture(params=["xxh3_128", "sha256"])
def cache(request: pytest.FixtureRequest) -> PrefixCache:
    return PrefixCache(8, request.param)


def ref(block: int) -> BlockRef:
    return BlockRef(BlockId(block), Epoch(0))


def enter(cache: PrefixCache, tokens: list[int], first: int = 0, tenant: str = "") -> list[bytes]:
    """Store the blocks of a prompt as `first`, `first + 1` …; return their hashes."""
    parent = cache.root(tenant)
    hashes = cache.hashes(tokens, parent)
    for index, value in enumerate(hashes):
        assert cache.insert(value, parent, ref(first + index)) == ref(first + index)
        parent = value
    return hashes


def test_the_longest_known_prefix_is_found(cache: PrefixCache):
    hashes = enter(cache, TOKENS)
    assert cache.match(hashes) == [ref(i) for i in range(5)]
    assert cache.match(hashes[:2]) == [ref(0), ref(1)]
    branch = cache.hashes([*TOKENS[:16], 99, *TOKENS[17:]], cache.root(""))
    assert cache.match(branch) == [ref(0), ref(1)]
    assert cache.match(cache.hashes([99, *TOKENS[1:]], cache.root(""))) == []
    cache.check([])


def test_the_same_tokens_after_another_prefix_are_another_block(cache: PrefixCache):
    enter(cache, [*range(8), *range(8)])
    assert len(cache) == 2


def test_tenants_share_nothing(cache: PrefixCache):
    enter(cache, TOKENS, tenant="a")
    assert cache.match(cache.hashes(TOKENS, cache.root("b"))) == []
    assert cache.match(cache.hashes(TOKENS, cache.root(""))) == []


def test_the_first_to_store_a_prefix_keeps_it(cache: PrefixCache):
    first, *_ = enter(cache, TOKENS)
    assert cache.insert(first, cache.root(""), ref(77)) == ref(0)
    assert cache.match([first]) == [ref(0)]
    assert cache.blocks() == set(range(5))


def test_a_forgotten_block_ends_the_prefix_there(cache: PrefixCache):
    hashes = enter(cache, TOKENS)
    cache.forget(BlockId(2))
    assert cache.match(hashes) == [ref(0), ref(1)]


def test_events_tell_what_came_and_went(cache: PrefixCache):
    start = cache.drain_events()
    assert (start.first, start.complete, start.events) == (0, True, ())
    root, (one, two) = cache.root(""), enter(cache, TOKENS[:16])
    cache.forget(BlockId(1))
    batch = cache.drain_events()
    assert (batch.first, batch.complete) == (0, False)
    assert batch.events == (
        BlockStored(one, root),
        BlockStored(two, one),
        BlockRemoved(two, one),
    )
    assert cache.drain_events().events == ()


def test_a_reader_that_comes_late_is_told_everything_parents_first(cache: PrefixCache):
    one, two, three = enter(cache, TOKENS[:24])
    cache.forget(BlockId(0))
    cache.insert(one, cache.root(""), ref(9))  # now the last in the index, and the first parent
    batch = cache.drain_events()
    assert batch.complete
    assert batch.events == (
        BlockStored(one, cache.root("")),
        BlockStored(two, one),
        BlockStored(three, two),
    )


def test_a_log_that_nobody_drains_is_bounded_and_starts_anew():
    log, contents = KVEventLog(3), [BlockStored(b"all", b"")]
    log.drain(list)
    for number in range(10):
        log.record(BlockStored(bytes([number]), b""))
        assert len(log._events) <= 3
    batch = log.drain(lambda: contents)
    assert (batch.first, batch.complete, batch.events) == (4, True, tuple(contents))
    log.record(BlockRemoved(b"all", b""))
    batch = log.drain(lambda: contents)
    assert (batch.first, batch.complete, batch.events) == (5, False, (BlockRemoved(b"all", b""),))


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c._by_hash.popitem(),
        lambda c: c._by_block.pop(3),
        lambda c: c._by_block.__setitem__(8, c._by_block[0]),
    ],
)
def test_check_finds_a_broken_index(cache: PrefixCache, damage):
    enter(cache, TOKENS)
    damage(cache)
    with pytest.raises(AssertionError, match="two sides"):
        cache.check([])


def test_check_finds_a_parent_that_would_go_first(cache: PrefixCache):
    enter(cache, TOKENS)
    cache.check([BlockId(4), BlockId(3)])
    with pytest.raises(AssertionError, match="goes before"):
        cache.check([BlockId(3), BlockId(4)])
    with pytest.raises(AssertionError, match="goes before"):
        cache.check([BlockId(3)])
