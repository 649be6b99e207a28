from dataclasses import replace

import pytest

from baton.core.errors import Incompatible
from baton.core.kv_layout import KVLayout
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.kv_transfer.landing import Landing, landing_plan, least_page, pieces
from baton.kv_transfer.plan import TokenRange, plan_between

MODEL = KVLayout(layers=3, kv_heads=2, block_size=8, head_dim=16, dtype="bfloat16")
OURS = ShardedLayout(MODEL)
THEIRS = ShardedLayout(replace(MODEL, dtype="float32", block_size=32))


def test_equal_layouts_land_in_the_pool_where_that_can_be_written() -> None:
    assert landing_plan(OURS, OURS, Landing()) is plan_between(OURS, OURS)
    staged = landing_plan(OURS, OURS, Landing(in_pool=False, page_bytes=1 << 20))
    assert not staged.in_place
    # Prefill need not know: its digests are of the same units, under the same name.
    assert staged.identity == plan_between(OURS, OURS).identity


def test_the_least_page_holds_a_block_of_any_peer() -> None:
    size = least_page(MODEL)
    assert size == 3 * 2 * 2 * 32 * 16 * 4
    assert not landing_plan(THEIRS, OURS, Landing(page_bytes=size)).in_place
    assert least_page(replace(MODEL, block_size=64)) == 2 * size
    large = ShardedLayout(replace(MODEL, dtype="float32", block_size=64))
    with pytest.raises(Incompatible, match=f"pages of {size} bytes .* {2 * size} bytes must fit"):
        landing_plan(large, OURS, Landing(page_bytes=size))
    assert not landing_plan(large, OURS, Landing(page_bytes=2 * size)).in_place


def test_other_ranks_have_pages_that_fit_their_own_layers() -> None:
    uneven = ShardedLayout(MODEL, stages=(1,))
    page = least_page(replace(MODEL, layers=1))
    assert not landing_plan(THEIRS, uneven, Landing(page_bytes=page)).in_place


@pytest.mark.parametrize("in_pool", [True, False])
def test_without_staging_what_must_be_converted_is_refused(in_pool: bool) -> None:
    theirs = THEIRS if in_pool else OURS
    with pytest.raises(Incompatible, match=r"decode of bfloat16 .* no staging memory"):
        landing_plan(theirs, OURS, Landing(in_pool=in_pool))


@pytest.mark.parametrize(("start", "end"), [(0, 200), (8, 200), (40, 41), (64, 96), (24, 64)])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_pieces_fit_a_page_and_end_where_both_blocks_do(start: int, end: int, blocks: int) -> None:
    plan = plan_between(THEIRS, OURS)
    unit = plan.landing(Rank(), MODEL.all_layers).layout.block_bytes
    page = unit * 4 * blocks + unit // 2
    parts = list(pieces(plan, Rank(), MODEL.all_layers, TokenRange(start, end), page))
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert (parts[0].start, parts[-1].end) == (start, end)
    assert all(part.end % 32 == 0 for part in parts[:-1])
    assert all(plan.num_units(part) * unit <= page for part in parts)
    assert len(parts) <= -(-(end - start // 32 * 32) // (32 * blocks))


def test_a_page_that_holds_no_block_is_a_bug() -> None:
    plan = plan_between(THEIRS, OURS)
    with pytest.raises(AssertionError, match="a page of 100 bytes"):
        list(pieces(plan, Rank(), MODEL.all_layers, TokenRange(0, 8), 100))
