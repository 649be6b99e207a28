"""The tensors of a plan say what the plan says."""

import pytest
import torch

from baton.core.ids import BlockId, SeqId
from baton.core.kv_layout import KVLayout
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.batch import make_batch

LAYOUT = KVLayout(layers=3, kv_heads=2, block_size=8, head_dim=4, dtype="float32")
SAMPLING = SamplingParams(seed=5)


def part(
    seq_id: int, start: int, count: int, blocks: tuple[int, ...], samples: bool = True
) -> ScheduledSequence:
    tokens = tuple(1000 * seq_id + start + i for i in range(count))
    table = tuple(BlockId(b) for b in blocks)
    return ScheduledSequence(SeqId(seq_id), tokens, start, table, samples, SAMPLING)


CHUNK = part(1, 8, 10, (20, 21, 22), samples=False)
DECODE = part(2, 3, 1, (30,))
FIRST = part(3, 0, 5, (40, 41))
LONG_DECODE = part(4, 16, 1, (50, 51, 52))
PLAN = StepPlan(0, (CHUNK, DECODE, FIRST, LONG_DECODE))


def test_decodes_come_first_and_the_longest_of_them_first() -> None:
    batch = make_batch(PLAN, LAYOUT)
    assert batch.model.tokens.tolist() == [
        4016,
        2003,
        *range(1008, 1018),
        *range(3000, 3005),
    ]
    assert batch.model.positions.tolist() == [16, 3, *range(8, 18), *range(5)]


def test_sampled_rows_are_last_tokens() -> None:
    batch = make_batch(PLAN, LAYOUT)
    assert batch.model.sampled.tolist() == [0, 1, 16]
    assert [(r.seq_id, r.position) for r in batch.sampled] == [(4, 17), (2, 4), (3, 5)]
    assert all(r.sampling is SAMPLING for r in batch.sampled)


def test_a_plan_may_sample_nothing() -> None:
    batch = make_batch(StepPlan(0, (CHUNK,)), LAYOUT)
    assert batch.model.sampled.tolist() == []
    assert batch.sampled == ()


def test_slots_are_where_the_layout_puts_each_token() -> None:
    slots = make_batch(PLAN, LAYOUT).model.attention[None].slots.view(-1, 2, 2)
    pool = torch.arange(60 * 3 * 2 * 2 * 8).view(60, 3, 2, 2, 8)
    for row, (block, offset) in enumerate([(52, 0), (30, 3), (21, 0), (21, 1)]):
        assert torch.equal(slots[row], pool[block, 0, :, :, offset])
    assert torch.equal(slots[11], pool[22, 0, :, :, 1])


def test_fresh_blocks_are_those_whose_first_slot_is_written() -> None:
    assert sorted(make_batch(PLAN, LAYOUT).fresh_blocks.tolist()) == [21, 22, 40, 52]
    assert make_batch(StepPlan(0, (DECODE,)), LAYOUT).fresh_blocks.tolist() == []


def test_decodes_are_padded_with_their_own_blocks_and_masked() -> None:
    (group,) = make_batch(PLAN, LAYOUT).model.attention[None].decodes
    assert (group.start, group.end) == (0, 2)
    runs = group.runs.view(2, 2, 2, 3)
    per_block = 3 * 2 * 2
    assert (runs[0, 0, 0] // per_block).tolist() == [50, 51, 52]
    assert (runs[1, 1, 1] // per_block).tolist() == [30, 30, 30]
    assert (runs[1, 1, 1] % per_block).tolist() == [3, 3, 3]
    seen = (group.mask == 0).sum(-1).flatten()
    assert seen.tolist() == [17, 4]
    assert (group.mask[1, 0, 0, :4] == 0).all()


def test_chunks_see_themselves_and_what_was_before() -> None:
    later, first = make_batch(PLAN, LAYOUT).model.attention[None].chunks
    assert (later.start, later.end, later.length) == (2, 12, 18)
    assert later.mask is not None
    assert later.mask.shape == (10, 18)
    assert (later.mask == 0).sum(-1).tolist() == list(range(9, 19))
    assert (later.mask[0, :9] == 0).all()
    assert (first.start, first.end, first.length, first.mask) == (12, 17, 5, None)


def test_a_window_leaves_out_blocks_that_no_new_token_sees() -> None:
    batch = make_batch(PLAN, LAYOUT, windows=(None, 3, 100)).model.attention
    assert batch[3].slots is batch[None].slots
    later, first = batch[3].chunks
    assert (later.first, later.length, later.window) == (0, 18, 3)
    assert (first.first, first.length) == (0, 5)
    assert first.mask is not None
    assert (first.mask == 0).sum(-1).tolist() == [1, 2, 3, 3, 3]
    assert batch[100].chunks[1].mask is None
    (group,) = batch[3].decodes
    per_block = 3 * 2 * 2
    assert (group.runs.view(2, 4, 2)[0, 0] // per_block).tolist() == [51, 52]
    assert (group.mask[0] == 0).nonzero()[:, -1].tolist() == [6, 7, 8]
    assert (group.mask[1] == 0).nonzero()[:, -1].tolist() == [1, 2, 3]
    (far,) = (
        make_batch(StepPlan(0, (part(1, 160, 20, tuple(range(23))),)), LAYOUT, windows=(9,))
        .model.attention[9]
        .chunks
    )
    assert (far.first, len(far.runs)) == (152, 4 * 4)


@pytest.mark.parametrize(("window", "keys"), [(None, 32768), (1000, 256 + 999)])
def test_masks_of_long_prompts_are_linear_in_their_length(window: int | None, keys: int) -> None:
    chunk = part(1, 30720, 2048, tuple(range(4096)))
    (found,) = (
        make_batch(StepPlan(0, (chunk,)), LAYOUT, windows=(window,)).model.attention[window].chunks
    )
    assert found.mask is not None
    assert found.mask.shape == (256, keys)


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([1, 1, 1], [3]),
        ([60, 1, 30], [3]),
        ([800, 790, 60, 50, 400], [3, 2]),
        ([800, 300, 100, 40], [1, 1, 1, 1]),
        ([800] * 5, [5]),
    ],
)
def test_decodes_of_like_length_share_a_group(lengths: list[int], groups: list[int]) -> None:
    parts = tuple(part(i, n - 1, 1, tuple(range(100))) for i, n in enumerate(lengths))
    decodes = make_batch(StepPlan(0, parts), LAYOUT).model.attention[None].decodes
    assert [g.end - g.start for g in decodes] == groups
    assert [g.start for g in decodes] == [sum(groups[:i]) for i in range(len(groups))]
    ordered = sorted(lengths, reverse=True)
    for group in decodes:
        seen = (group.mask == 0).sum(-1).flatten().tolist()
        assert seen == ordered[group.start : group.end]


def test_blocks_reserved_ahead_are_not_read() -> None:
    (group,) = (
        make_batch(StepPlan(0, (part(1, 2, 1, tuple(range(50))),)), LAYOUT)
        .model.attention[None]
        .decodes
    )
    assert group.mask.shape == (1, 1, 1, 8)


def test_a_block_table_that_is_too_short_is_a_bug() -> None:
    with pytest.raises(IndexError):
        make_batch(StepPlan(0, (part(1, 0, 9, (1,)),)), LAYOUT)
