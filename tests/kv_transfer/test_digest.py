from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from baton.core.handover import BlockRef, OfferedBlock
from baton.core.ids import BlockId, Epoch, Ticket
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.kernels.kv_digest import Digests, copy_and_hash
from baton.kv_transfer.digest import DigestKey
from baton.kv_transfer.plan import TokenRange, TransferPlan, UnitReads

from .layout_pairs import pairs

LAYOUT = KVLayout(layers=4, kv_heads=2, block_size=16, head_dim=4, dtype="float32")
LAYERS = LAYOUT.all_layers
PROMPT = tuple(range(40))
TICKET = Ticket(b"t" * 16)
REF = BlockRef(BlockId(5), Epoch(2))
DATA = np.random.default_rng(0).integers(0, 256, 8 * LAYOUT.block_bytes, np.uint8)
NUM_BLOCKS = 12

Bytes = NDArray[np.uint8]


def digest_of(
    *,
    model: KVLayout = LAYOUT,
    compatibility: str = "c",
    ticket: bytes = TICKET,
    prompt: tuple[int, ...] = PROMPT,
    index: int = 1,
    ref: BlockRef = REF,
    layers: LayerRange = LAYERS,
    data: Bytes = DATA,
) -> bytes:
    plan = TransferPlan(ShardedLayout(LAYOUT), ShardedLayout(model))
    key = DigestKey(plan, compatibility=compatibility, ticket=Ticket(ticket), prompt=prompt)
    (digest,) = key.offered(Rank(), layers, index, [ref], memoryview(data))
    return digest


def flipped(data: Bytes, at: int) -> Bytes:
    data = data.copy()
    data[at] ^= 1
    return data


def test_equal_layouts_have_one_digest_per_block_and_layer_group() -> None:
    assert len(digest_of()) == len(digest_of(layers=LayerRange(1, 2))) == 16


@pytest.mark.parametrize(
    "change",
    [
        {"compatibility": "d"},
        {"model": replace(LAYOUT, dtype="bfloat16")},
        {"ticket": b"u" * 16},
        {"prompt": (99, *PROMPT[1:])},
        {"index": 0},
        {"ref": replace(REF, epoch=Epoch(3))},
        {"ref": replace(REF, block=BlockId(6)), "data": np.roll(DATA, LAYOUT.block_bytes)},
        {"layers": LayerRange(0, 3)},
        {"data": flipped(DATA, 5 * LAYOUT.block_bytes)},
        {"data": flipped(DATA, 6 * LAYOUT.block_bytes - 1)},
    ],
    ids=lambda change: " and ".join(change),
)
def test_every_fact_is_bound(change: dict[str, Any]) -> None:
    assert digest_of(**change) != digest_of()


def test_layers_and_heads_of_equal_bytes_have_digests_of_their_own() -> None:
    zeros = np.zeros_like(DATA)
    assert digest_of(layers=LayerRange(0, 1), data=zeros) != digest_of(
        layers=LayerRange(1, 2), data=zeros
    )
    plan = TransferPlan(ShardedLayout(LAYOUT), ShardedLayout(LAYOUT, tp=2))
    key = DigestKey(plan, compatibility="c", ticket=TICKET, prompt=PROMPT)
    (both,) = key.offered(Rank(), LAYERS, 1, [REF], memoryview(zeros))
    assert both[:16] != both[16:]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": (*PROMPT, 1, 2, 3)},
        {"data": flipped(DATA, 6 * LAYOUT.block_bytes)},
        {"data": flipped(DATA, 5 * LAYOUT.block_bytes - 1)},
    ],
    ids=["later tokens", "the block after", "the block before"],
)
def test_what_is_not_of_the_block_changes_nothing(change: dict[str, Any]) -> None:
    assert digest_of(**change) == digest_of()


class Handover:
    """The pools of all ranks of a pair, and one offer read by every target rank."""

    def __init__(self, plan: TransferPlan, layers: LayerRange, tokens: TokenRange, total: int):
        self.plan, self.layers, self.tokens = plan, layers, tokens
        rng = np.random.default_rng(1)
        size = plan.source.model.block_size
        table = rng.permutation(NUM_BLOCKS).tolist()
        self.key = DigestKey(plan, compatibility="c", ticket=TICKET, prompt=range(total))
        first = tokens.start // size
        refs = [BlockRef(b, Epoch(b + 1)) for b in table[first : -(-tokens.end // size)]]
        self.source_pools = {
            rank: rng.integers(
                0, 256, NUM_BLOCKS * plan.source.shard(rank).layout.block_bytes, np.uint8
            )
            for rank in plan.source.ranks
        }
        by_rank = [
            self.key.offered(rank, layers, first, refs, memoryview(self.source_pools[rank]))
            for rank in plan.source.ranks
        ]
        digests = [b"".join(ranks) for ranks in zip(*by_rank, strict=True)]
        self.offered = [OfferedBlock(*pair) for pair in zip(refs, digests, strict=True)]
        self.landing_table = rng.permutation(NUM_BLOCKS).tolist()
        self.source_blocks = [ref.block for ref in refs]

    def _reads(self, rank: Rank) -> dict[Rank, UnitReads]:
        return self.plan.reads(
            rank,
            self.layers,
            self.tokens,
            self.source_blocks,
            self.landing_table,
            turn=self.plan.turn(TICKET),
        )

    def read(self, rank: Rank) -> tuple[Bytes, list[int]]:
        """Return what a rank has after its reads, and where in it they wrote."""
        landing = self.plan.landing(rank, self.layers).layout
        memory = np.zeros(NUM_BLOCKS * landing.block_bytes, np.uint8)
        written: list[int] = []
        for source, runs in self._reads(rank).items():
            for run in runs:
                local = range(run.local_offset, run.local_offset + run.length)
                memory[local] = self.source_pools[source][run.remote_offset :][: run.length]
                written += local
        return memory, written

    def first_wrong(self, rank: Rank, memory: Bytes) -> int | None:
        return self.key.first_wrong(
            rank, self.layers, self.tokens, self.offered, self.landing_table, memoryview(memory)
        )

    def hashed_on_the_way(self, rank: Rank) -> tuple[Bytes, dict[Rank, Digests]]:
        """Return what a rank has after reads by a transport that hashes, and its hashes."""
        landing = self.plan.landing(rank, self.layers).layout
        memory = np.zeros(NUM_BLOCKS * landing.block_bytes, np.uint8)
        hashes = {}
        for source, reads in self._reads(rank).items():
            units = self.key.units_read(rank, source, self.layers, self.tokens, self.offered, reads)
            hashes[source] = copy_and_hash(
                units.key,
                memory,
                units.into,
                self.source_pools[source],
                units.pieces,
                units.labels,
            )
        return memory, hashes

    def first_wrong_of(self, rank: Rank, hashes: dict[Rank, Digests]) -> int | None:
        """Verify by hashes alone."""
        return self.key.first_wrong_of(rank, self.layers, self.tokens, self.offered, hashes)


def draw_handover(pair: tuple[ShardedLayout, ShardedLayout], data: st.DataObject) -> Handover:
    plan = TransferPlan(*pair)
    start = min(data.draw(st.integers(0, 3)) * plan.unit_tokens, 64)
    total = data.draw(st.integers(start + 1, 96))
    # An offer ends with a source block or with the prompt.
    ends = {total, *range(start - start % 32 + 32, total, 32)}
    end = data.draw(st.sampled_from(sorted(ends)))
    first = data.draw(st.integers(0, plan.source.model.layers - 1))
    layers = LayerRange(first, data.draw(st.integers(first + 1, plan.source.model.layers)))
    return Handover(plan, layers, TokenRange(start, end), total)


@settings(max_examples=100, deadline=None)
@given(pair=pairs(), data=st.data())
def test_every_rank_verifies_just_what_it_read(
    pair: tuple[ShardedLayout, ShardedLayout], data: st.DataObject
) -> None:
    handover = draw_handover(pair, data)
    rank = data.draw(st.sampled_from(handover.plan.target.ranks))
    memory, written = handover.read(rank)
    assert handover.first_wrong(rank, memory) is None
    assume(written)
    at = data.draw(st.sampled_from(written))
    wrong = handover.first_wrong(rank, flipped(memory, at))
    assert wrong is not None
    assert wrong in range(handover.tokens.start, handover.tokens.end, handover.plan.unit_tokens)
    spared = np.ones(memory.size, np.bool_)
    spared[written] = False
    memory[spared] ^= 0xFF
    assert handover.first_wrong(rank, memory) is None


@settings(max_examples=100, deadline=None)
@given(pair=pairs(), data=st.data())
def test_hashes_on_the_way_serve_as_well(
    pair: tuple[ShardedLayout, ShardedLayout], data: st.DataObject
) -> None:
    handover = draw_handover(pair, data)
    rank = data.draw(st.sampled_from(handover.plan.target.ranks))
    assume(handover.plan.links(rank, handover.layers, handover.plan.turn(TICKET)))
    memory, hashes = handover.hashed_on_the_way(rank)
    assert np.array_equal(memory, handover.read(rank)[0])
    assert handover.first_wrong_of(rank, hashes) is None
    source = data.draw(st.sampled_from(sorted(hashes)))
    pool = handover.source_pools[source]
    pool[data.draw(st.integers(0, pool.size - 1))] ^= 1  # after it was offered
    memory, hashes = handover.hashed_on_the_way(rank)
    assert handover.first_wrong_of(rank, hashes) == handover.first_wrong(rank, memory)


@pytest.mark.parametrize(
    ("source", "target", "units"),
    [
        (ShardedLayout(LAYOUT), ShardedLayout(LAYOUT), 1),
        (ShardedLayout(LAYOUT, 2), ShardedLayout(LAYOUT), 2),
        (ShardedLayout(LAYOUT), ShardedLayout(LAYOUT, 2), 2),
        (ShardedLayout(LAYOUT), ShardedLayout(LAYOUT, 8), 2),
        (ShardedLayout(LAYOUT), ShardedLayout(replace(LAYOUT, block_size=8)), 2),
        (ShardedLayout(LAYOUT), ShardedLayout(replace(LAYOUT, block_size=32)), 1),
        (ShardedLayout(LAYOUT, stages=(1,)), ShardedLayout(LAYOUT, stages=(2,)), 3),
    ],
)
def test_units_are_as_large_as_both_sides_allow(
    source: ShardedLayout, target: ShardedLayout, units: int
) -> None:
    handover = Handover(TransferPlan(source, target), LAYERS, TokenRange(0, 16), 40)
    assert len(handover.offered[0].digest) == units * 16


def test_units_beyond_the_end_of_the_prompt_have_no_digest() -> None:
    plan = TransferPlan(ShardedLayout(LAYOUT), ShardedLayout(replace(LAYOUT, block_size=8)))
    handover = Handover(plan, LAYERS, TokenRange(0, 40), 40)
    assert [len(block.digest) for block in handover.offered] == [32, 32, 16]
    memory, _ = handover.read(Rank())
    assert handover.first_wrong(Rank(), memory) is None


@pytest.mark.parametrize("digest", [b"", b"d" * 15, b"d" * 32])
def test_a_malformed_digest_is_a_wrong_one(digest: bytes) -> None:
    plan = TransferPlan(ShardedLayout(LAYOUT), ShardedLayout(LAYOUT))
    handover = Handover(plan, LAYERS, TokenRange(0, 40), 40)
    memory, _ = handover.read(Rank())
    _, hashes = handover.hashed_on_the_way(Rank())
    handover.offered[1] = replace(handover.offered[1], digest=digest)
    assert handover.first_wrong(Rank(), memory) == 16
    assert handover.first_wrong_of(Rank(), hashes) == 16


def test_what_is_prepared_is_what_the_first_digests_would_make() -> None:
    plan = TransferPlan(ShardedLayout(LAYOUT), ShardedLayout(LAYOUT))
    key = DigestKey(plan, compatibility="c", ticket=TICKET, prompt=PROMPT)
    key.prepare()
    assert key.offered(Rank(), LAYERS, 1, [REF], memoryview(DATA)) == [digest_of()]
