"""The ranks along cp compute each token of a long prompt once, and about as much each."""

import random

import pytest
import torch

from baton.core.ids import BlockId, SeqId
from baton.core.kv_layout import KVLayout
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.batch import Batch, make_batch
from baton.executor.context_batch import ContextPlace, make_context_batch

LAYOUT = KVLayout(layers=2, kv_heads=2, block_size=8, head_dim=4, dtype="float32")
WINDOWS = (None, 20)
RING_FROM = 30


def part(seq: int, start: int, length: int, *, samples: bool = True) -> ScheduledSequence:
    blocks = [BlockId(block) for block in range(seq * 100, seq * 100 + 100)]
    random.Random(seq).shuffle(blocks)
    tokens = tuple(range(start, start + length))
    return ScheduledSequence(SeqId(seq), tokens, start, tuple(blocks), samples, SamplingParams())


MIXED = (part(0, 50, 1), part(1, 13, 100), part(2, 0, 29), part(3, 0, 31, samples=False))


def batches(parts: tuple[ScheduledSequence, ...], size: int) -> list[Batch]:
    return [
        make_context_batch(
            StepPlan(0, parts), LAYOUT, ContextPlace(rank, size, RING_FROM), windows=WINDOWS
        )
        for rank in range(size)
    ]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_token_of_a_split_prompt_is_on_one_rank(size: int) -> None:
    found = batches(MIXED, size)
    rings = [ring for batch in found if (ring := batch.model.ring) is not None]
    for rank, (batch, ring) in enumerate(zip(found, rings, strict=True)):
        assert ring.start == 1 + 29  # a decode and a short prompt, on every rank
        assert ring.rows(rank) == len(batch.model.tokens) - ring.start
        assert ring.segments == rings[0].segments
        assert [past.length for past in ring.past] == [13, 0]
        assert [past.runs.shape[1] for past in ring.past] == [2, 0]
        for segment in ring.segments[rank]:
            rows = slice(ring.start + segment.rows.start, ring.start + segment.rows.stop)
            positions = batch.model.positions[rows].tolist()
            assert positions == list(range(segment.first, segment.first + len(positions)))
            assert batch.model.tokens[rows].tolist() == positions
    for prompt, sequence in enumerate([MIXED[1], MIXED[3]]):
        places = [
            position
            for segments in rings[0].segments
            for s in segments
            if s.prompt == prompt
            for position in range(s.first, s.first + s.rows.stop - s.rows.start)
        ]
        assert sorted(places) == list(range(sequence.start, sequence.end))


@pytest.mark.parametrize("size", [2, 3])
def test_kv_goes_where_one_rank_alone_would_write_it(size: int) -> None:
    whole = make_batch(StepPlan(0, MIXED), LAYOUT, windows=WINDOWS)
    every = set(whole.model.attention[None].slots.tolist())
    for rank, batch in enumerate(found := batches(MIXED, size)):
        ring = batch.model.ring
        assert ring is not None
        own = batch.model.attention[None].slots
        runs = LAYOUT.runs_per_layer
        assert torch.equal(own[ring.start * runs :], ring.slots[rank])
        written = own[: ring.start * runs].tolist() + torch.cat(ring.slots).tolist()
        assert len(written) == len(every)
        assert set(written) == every
        assert set(batch.fresh_blocks.tolist()) == set(whole.fresh_blocks.tolist())
        assert batch.fresh_blocks.tolist() == found[0].fresh_blocks.tolist()


def test_rank_0_samples_what_the_plan_samples() -> None:
    whole = make_batch(StepPlan(0, MIXED), LAYOUT, windows=WINDOWS)
    first, *others = batches(MIXED, 3)
    assert {row.seq_id: row for row in first.sampled} == {row.seq_id: row for row in whole.sampled}
    order = [row.seq_id for row in first.sampled]
    rows = dict(zip(order, first.model.sampled.tolist(), strict=True))
    for seq, sequence in enumerate(MIXED):
        if sequence.samples:
            assert first.model.positions[rows[SeqId(seq)]] == sequence.end - 1
    for batch in others:
        assert batch.sampled == ()
        assert batch.model.sampled.tolist() == []


def test_short_prompts_are_on_every_rank_and_make_no_ring() -> None:
    short = (MIXED[0], MIXED[2])
    whole = make_batch(StepPlan(0, short), LAYOUT, windows=WINDOWS)
    for batch in batches(short, 2):
        assert batch.model.ring is None
        assert torch.equal(batch.model.tokens, whole.model.tokens)
        assert len(batch.model.attention[20].chunks) == 1


def test_one_rank_has_no_ring() -> None:
    [batch] = batches(MIXED, 1)
    assert batch.model.ring is None
    assert len(batch.model.attention[None].chunks) == 3


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_see_about_as_many_keys(size: int) -> None:
    work = []
    for rank, batch in enumerate(batches((part(1, 0, 800),), size)):
        ring = batch.model.ring
        assert ring is not None
        work.append(
            sum(
                position + 1
                for s in ring.segments[rank]
                for position in range(s.first, s.first + s.rows.stop - s.rows.start)
            )
        )
    assert max(work) < 1.02 * min(work)
