from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import Incompatible
from baton.core.ids import Ticket
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.kv_transfer.plan import TokenRange, TransferPlan

from .layout_pairs import MAX_TOKENS, NOTHING, Pool, fill, pairs

NUM_BLOCKS = 12
MODEL = KVLayout(layers=4, kv_heads=8, block_size=16, head_dim=4, dtype="float32")


def check_reads(
    plan: TransferPlan,
    layers: LayerRange,
    tokens: TokenRange,
    source_table: list[int],
    target_table: list[int],
    turn: int = 0,
) -> None:
    """Perform a plan's reads for every rank; assert that every byte came once, and no other."""
    unit, source_size = plan.unit_tokens, plan.source.model.block_size
    end = -(-tokens.end // unit) * unit
    everything = TokenRange(0, -(-end // source_size) * source_size)
    pools = {
        rank: fill(
            plan.source.shard(rank),
            NUM_BLOCKS,
            source_table,
            everything,
            LayerRange(0, plan.source.model.layers),
            source_size,
        )
        for rank in plan.source.ranks
    }
    theirs = source_table[tokens.start // source_size :]
    offset = 0 if plan.in_place else 48
    for rank in plan.target.ranks:
        landing = plan.landing(rank, layers)
        size = landing.layout.block_size
        if plan.in_place:
            table, num_blocks = target_table[tokens.start // size :], NUM_BLOCKS
        else:
            table = list(range(plan.num_units(tokens)))
            num_blocks = len(table)
        tables = plan.reads(rank, layers, tokens, theirs, table, landing_offset=offset, turn=turn)
        wanted = TokenRange(tokens.start, end)
        expected = fill(landing, num_blocks, table, wanted, layers, source_size, base=tokens.start)
        found = np.full(offset + expected.size, NOTHING, np.int64)
        fewest = 0
        for source, runs in tables.items():
            remote = np.full(found.size, NOTHING, np.int64)
            for run in runs:
                local = slice(run.local_offset, run.local_offset + run.length)
                assert np.all(found[local] == NOTHING), "written twice"
                found[local] = pools[source][run.remote_offset :][: run.length]
                remote[local] = np.arange(run.length) + run.remote_offset
            fewest = _fewest(remote)
            assert len(runs) == fewest, "runs that could be one"
            assert runs.nbytes == np.sum(remote != NOTHING)
        assert np.array_equal(found[offset:], expected)
        assert np.all(found[:offset] == NOTHING)


def _fewest(remote: Pool) -> int:
    """Return how many runs it takes at least to fill bytes from these remote addresses."""
    before = np.concatenate(([NOTHING], remote[:-1]))
    return int(np.sum((remote != NOTHING) & ((before == NOTHING) | (remote != before + 1))))


@settings(max_examples=150, deadline=None)
@given(pair=pairs(), data=st.data())
def test_every_byte_of_the_target_is_written_once_from_the_right_source(
    pair: tuple[ShardedLayout, ShardedLayout], data: st.DataObject
) -> None:
    plan = TransferPlan(*pair)
    start = data.draw(st.integers(0, 4)) * plan.unit_tokens
    tokens = TokenRange(start, data.draw(st.integers(start, max(start, MAX_TOKENS))))
    first = data.draw(st.integers(0, plan.source.model.layers - 1))
    layers = LayerRange(first, data.draw(st.integers(first + 1, plan.source.model.layers)))
    table = st.permutations(range(NUM_BLOCKS))
    turn = data.draw(st.integers(0, plan.source.replicas - 1))
    check_reads(plan, layers, tokens, data.draw(table), data.draw(table), turn)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("parts", [1, 2])
def test_all_pairs_of_sizes_have_a_plan(heads: int, parts: int) -> None:
    model = KVLayout(
        layers=3, kv_heads=heads, block_size=8, head_dim=2, dtype="float32", parts=parts
    )
    tables = list(range(NUM_BLOCKS)), list(range(NUM_BLOCKS))[::-1]
    for sizes in product((8, 16, 32), repeat=2):
        for tps in product((1, 2, 4, 8), repeat=2):
            source, target = (
                ShardedLayout.even(replace(model, block_size=size), tp=tp, pp=pp)
                for size, tp, pp in zip(sizes, tps, (2, 1), strict=True)
            )
            plan = TransferPlan(source, target)
            check_reads(plan, LayerRange(0, 3), TokenRange(0, 40), *tables)


def test_equal_layouts_need_one_run_per_block_and_one_for_neighbours() -> None:
    plan = TransferPlan(ShardedLayout(MODEL), ShardedLayout(MODEL))
    tokens = TokenRange(0, 64)
    (runs,) = plan.reads(Rank(), MODEL.all_layers, tokens, [3, 9, 1, 2], [0, 4, 7, 8]).values()
    size = MODEL.block_bytes
    assert [(r.local_offset, r.remote_offset, r.length) for r in runs] == [
        (0, 3 * size, size),
        (4 * size, 9 * size, size),
        (7 * size, size, 2 * size),
    ]
    assert runs[1] == list(runs)[1]
    assert list(runs[1:]) == list(runs)[1:]
    assert repr(runs) == f"RunTable(3 runs, {4 * size} bytes)"


def test_no_tokens_are_no_runs() -> None:
    plan = TransferPlan(ShardedLayout(MODEL), ShardedLayout(replace(MODEL, block_size=32)))
    (runs,) = plan.reads(Rank(), MODEL.all_layers, TokenRange(32, 32), [], []).values()
    assert len(runs) == 0


def test_too_few_blocks_are_a_bug() -> None:
    plan = TransferPlan(ShardedLayout(MODEL), ShardedLayout(MODEL))
    with pytest.raises(AssertionError, match="1 blocks for 2 units"):
        plan.reads(Rank(), MODEL.all_layers, TokenRange(0, 32), [1], [1, 2])
    with pytest.raises(AssertionError, match="begin inside a unit"):
        plan.reads(Rank(), MODEL.all_layers, TokenRange(8, 32), [1], [1, 2])
    with pytest.raises(AssertionError, match="end=5"):
        plan.reads(Rank(), LayerRange(0, 5), TokenRange(0, 16), [1], [1])


LATENT = KVLayout(layers=4, kv_heads=1, block_size=16, head_dim=4, dtype="float32", parts=1)


@pytest.mark.parametrize(("theirs", "ours"), list(product((1, 2, 4, 8), repeat=2)))
def test_a_latent_is_read_from_one_replica_each_and_from_all_alike(theirs: int, ours: int) -> None:
    plan = TransferPlan(ShardedLayout(LATENT, theirs), ShardedLayout(LATENT, ours))
    readers: Counter[Rank] = Counter()
    for rank in plan.target.ranks:
        (link,) = plan.links(rank, LATENT.all_layers)
        readers[link.source] += 1
    assert len(readers) == min(theirs, ours)
    assert max(readers.values()) == max(1, ours // theirs)


def test_requests_take_turns_with_replicas() -> None:
    plan = TransferPlan(ShardedLayout(LATENT, 4), ShardedLayout(LATENT))
    turns = [plan.turn(Ticket(bytes(15) + bytes([n]))) for n in range(8)]
    links = [plan.links(Rank(), LATENT.all_layers, turn) for turn in turns]
    assert [link.source.tp for (link,) in links] == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 5}, "KV layers must be equal: prefill has 4, decode 5"),
        ({"kv_heads": 4}, "KV kv_heads must be equal: prefill has 8, decode 4"),
        ({"head_dim": 8}, "KV head_dim must be equal: prefill has 4, decode 8"),
        ({"parts": 1}, "KV parts must be equal: prefill has 2, decode 1"),
        ({"block_size": 24}, "one block_size must divide the other: prefill has 16, decode 24"),
        ({"dtype": "float16"}, "float16 of decode cannot hold all values of prefill's float32"),
    ],
)
def test_what_cannot_become_the_other_is_refused(change: dict[str, object], message: str) -> None:
    target = ShardedLayout(replace(MODEL, **change))  # type: ignore[arg-type]
    with pytest.raises(Incompatible, match=message):
        TransferPlan(ShardedLayout(MODEL), target)


@pytest.mark.parametrize(
    ("source", "target", "in_place"),
    [
        (("float32", 16), ("float32", 32), True),
        (("float16", 16), ("float16", 16), True),
        (("float16", 16), ("float32", 16), False),
        (("float32", 16), ("float8_e4m3fn", 16), False),
        (("float8_e4m3fn", 32), ("float8_e4m3fn", 16), True),
        (("float8_e4m3fn", 16), ("float8_e4m3fn", 32), False),
    ],
)
def test_bytes_land_in_place_where_they_can(
    source: tuple[str, int], target: tuple[str, int], in_place: bool
) -> None:
    sides = (
        ShardedLayout(replace(MODEL, dtype=dtype, block_size=size))
        for dtype, size in (source, target)
    )
    plan = TransferPlan(*sides)
    assert plan.in_place == in_place
    assert plan.unit_tokens == min(source[1], target[1])
    assert plan.offer_tokens == max(source[1], target[1])
    assert "→" in repr(plan)


def test_a_conversion_says_what_becomes_of_staged_units() -> None:
    small = replace(MODEL, dtype="bfloat16", block_size=8)
    plan = TransferPlan(ShardedLayout(small), ShardedLayout(MODEL, tp=2, stages=(1,)))
    tokens = TokenRange(24, 50)
    conversion = plan.conversion(Rank(pp=1), LayerRange(2, 4), tokens, [5, 7, 6])
    assert conversion.staging == replace(small, layers=2, kv_heads=4)
    assert conversion.target == replace(MODEL, layers=3, kv_heads=4)
    assert (conversion.first_layer, conversion.tokens, conversion.first_slot) == (1, 26, 8)
    assert conversion.blocks == (5, 7, 6)


def test_a_scale_is_made_of_a_whole_block() -> None:
    target = ShardedLayout(replace(MODEL, dtype="float8_e4m3fn", block_size=32))
    plan = TransferPlan(ShardedLayout(MODEL), target)
    with pytest.raises(AssertionError, match="a scale is of a whole block"):
        plan.conversion(Rank(), MODEL.all_layers, TokenRange(16, 48), [1, 2])
