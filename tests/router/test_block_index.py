import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.router.block_index import BlockIndex
from baton.router.block_table import BlockTable, keys_from_bytes, keys_of


def keys(*values: int) -> np.ndarray:
    """Spread small numbers over 64 bits, as hashes are; never 0."""
    return np.array([(v + 1) * 0x9E3779B97F4A7C15 % 2**64 for v in values], np.uint64)


def swept(index: BlockIndex) -> None:
    for _ in range(10_000):
        if not index.sweep():
            return
    raise AssertionError("sweeping does not end")


def test_keys_are_the_beginnings_of_hashes_and_never_zero():
    found = keys_of([bytes(16), b"\x02" + bytes(15)])
    assert found.tolist() == [1, 2]
    assert keys_from_bytes(b"").tolist() == []


def test_depth_is_the_unbroken_prefix_of_each_holder():
    index = BlockIndex(1000)
    a, b, c = (index.new_holder() for _ in range(3))
    chain = keys(*range(10))
    index.stored(a, chain)
    index.stored(b, chain[:4])
    index.stored(c, chain[1:])
    assert index.depths(chain).tolist() == [10, 4, 0]
    assert index.depths(chain[:3]).tolist() == [3, 3, 0]
    index.removed(a, chain[6:])
    assert index.depths(chain).tolist() == [6, 4, 0]
    index.removed(a, chain[6:])  # twice is once
    assert index.depths(keys(99)).tolist() == [0, 0, 0]
    assert index.depths(chain[:0]).tolist() == [0, 0, 0]
    index.check()


@pytest.mark.parametrize("holders", [3, 4, 5, 70])
def test_a_prefix_that_all_share(holders):
    index = BlockIndex(1000)
    everyone = [index.new_holder() for _ in range(holders)]
    chain = keys(*range(12))
    for holder in everyone:
        index.stored(holder, chain[: 6 + holder % 7])
    assert index.depths(chain).tolist() == [6 + holder % 7 for holder in everyone]
    index.check()
    for holder in everyone[:-1]:  # those in the mask move up into the row
        index.removed(holder, chain)
        index.check()
    last = everyone[-1]
    assert index.depths(chain).tolist() == [0] * last + [6 + last % 7]
    index.removed(last, chain)
    assert index.stats().blocks == 0


def test_who_is_gone_is_forgotten_at_once_and_swept_out_later():
    index = BlockIndex(100_000)
    gone, stays = index.new_holder(), index.new_holder()
    chain = keys(*range(5000))
    index.stored(gone, chain)
    index.stored(stays, chain[:7])
    index.retire(gone)
    assert index.depths(chain).tolist() == [0, 7]
    assert index.new_holder() == 2, "its number is not given away before the sweep"
    assert index.stats().retired == 1
    swept(index)
    assert index.stats().retired == 0
    assert index.stats().blocks == 7
    assert index.new_holder() == gone
    assert index.depths(chain)[gone] == 0
    index.check()


def test_a_full_index_forgets_what_was_of_no_use_for_longest():
    index = BlockIndex(1000)
    holder = index.new_holder()
    kept, others = keys(*range(100)), keys(*range(1000, 6000))
    index.stored(holder, kept)
    for start in range(0, len(others), 50):
        index.stored(holder, others[start : start + 50])
        index.depths(kept)  # of use
        index.check()
    stats = index.stats()
    assert stats.evicted > 3000
    assert stats.blocks <= 1300
    assert index.depths(kept)[holder] == 100


def test_popular_blocks_beyond_the_bound_are_not_told_of_more_holders():
    index = BlockIndex(64)  # of which 16 may have more than four
    everyone = [index.new_holder() for _ in range(6)]
    chain = keys(*range(32))
    for holder in everyone:
        index.stored(holder, chain)
    stats = index.stats()
    assert (stats.wide_blocks, stats.untold) == (16, 32)
    assert all(index.depths(chain)[holder] == 32 for holder in everyone[:4])
    index.check()


def test_a_hundred_thousand_blocks_fit_with_hardly_a_loss():
    table = BlockTable(100_000)
    rng = np.random.default_rng(1)
    everything = np.unique(rng.integers(1, 2**64, 100_000, dtype=np.uint64))
    for start in range(0, len(everything), 1000):
        table.insert(everything[start : start + 1000])
    table.check()
    assert len(table) >= 0.999 * len(everything)
    assert table.nbytes <= 12 * len(everything)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([8, 40, 4000]))
def test_any_history_is_told_as_sets_tell_it(seed, blocks):
    """Beside plain sets: never more than these say, and the same as long as there is room."""
    rng = random.Random(seed)
    index, model = BlockIndex(blocks), dict[int, set[int]]()
    chains = [keys(*range(100 * n, 100 * n + 8)) for n in range(4)]
    for step in range(60):
        action, chain = rng.random(), rng.choice(chains)
        part = chain[rng.randrange(8) :] if rng.random() < 0.3 else chain[: rng.randrange(9)]
        if action < 0.15 or not model:
            holder = index.new_holder()
            assert holder not in model
            model[holder] = set()
        elif action < 0.6:
            holder = rng.choice(list(model))
            index.stored(holder, part)
            model[holder] |= set(part.tolist())
        elif action < 0.85:
            holder = rng.choice(list(model))
            index.removed(holder, part)
            model[holder] -= set(part.tolist())
        elif action < 0.9:
            holder = rng.choice(list(model))
            index.retire(holder)
            del model[holder]
        else:
            index.sweep()
        if step % 5 == 0:
            index.check()
        stats = index.stats()
        whole = stats.evicted == stats.untold == 0
        for chain in chains:
            depths = index.depths(chain)
            for holder, has in model.items():
                true = next((n for n, k in enumerate(chain.tolist()) if k not in has), 8)
                assert depths[holder] == true if whole else depths[holder] <= true
