"""The whole way between dtypes, for every rank: read into staging, verify, convert."""

from dataclasses import astuple, replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.core.handover import BlockRef, OfferedBlock
from baton.core.ids import BlockId, Epoch, Ticket
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.sharded_layout import Rank, Shard, ShardedLayout
from baton.kernels.kv_convert import convert_kv, scale_view, value_view
from baton.kv_transfer.digest import DigestKey
from baton.kv_transfer.plan import TokenRange, TransferPlan

MODEL = KVLayout(layers=3, kv_heads=4, block_size=8, head_dim=8, dtype="float32")
TOKENS = 44
NUM_BLOCKS = 8
LAYERS = LayerRange(1, 3)
TICKET = Ticket(b"t" * 16)
ERROR = {"float32": 0.0, "bfloat16": 2.0**-8, "float8_e4m3fn": 2.0**-4}


def decoded(pool: Tensor, layout: KVLayout) -> Tensor:
    values = value_view(pool, layout).to(torch.float32)
    return values * scale_view(pool, layout)[..., None, None] if layout.scaled else values


def filled(shard: Shard, truth: Tensor, table: list[int]) -> Tensor:
    """Return a source rank's pool that holds `truth` [layers, parts, heads, tokens, dims]."""
    layout = shard.layout
    pool = torch.full((NUM_BLOCKS * layout.block_bytes,), 0x3B, dtype=torch.uint8)
    held = truth[shard.layers.start : shard.layers.end, :, shard.heads.start : shard.heads.end]
    if layout.scaled:
        scale_view(pool, layout).fill_(0.25)
        held = held / 0.25
    values = value_view(pool, layout)
    for start in range(0, TOKENS, layout.block_size):
        part = held[..., start : start + layout.block_size, :]
        values[table[start // layout.block_size], ..., : part.shape[3], :] = part.to(values.dtype)
    return pool


CASES = [
    (theirs, ours, sizes, tps)
    for theirs, ours in product(ERROR, repeat=2)
    for sizes, tps in (((8, 16), (2, 1)), ((16, 8), (1, 4)), ((8, 8), (4, 2)))
    if theirs != ours or (theirs == "float8_e4m3fn" and sizes[0] < sizes[1])
]


@pytest.mark.parametrize(("theirs", "ours", "sizes", "tps"), CASES)
def test_every_rank_has_the_values_that_were_computed(
    theirs: str, ours: str, sizes: tuple[int, int], tps: tuple[int, int]
) -> None:
    source = ShardedLayout(replace(MODEL, block_size=sizes[0], dtype=theirs), tps[0], (2,))
    target = ShardedLayout(replace(MODEL, block_size=sizes[1], dtype=ours), tps[1])
    plan = TransferPlan(source, target)
    assert not plan.in_place
    torch.manual_seed(0)
    truth = torch.randn(3, 2, 4, TOKENS, 8)
    theirs_table, ours_table = [5, 2, 7, 0, 1, 3], [4, 1, 6, 2, 0, 3]
    pools = {rank: filled(source.shard(rank), truth, theirs_table) for rank in source.ranks}
    tokens = TokenRange(0, TOKENS)
    refs = [BlockRef(BlockId(b), Epoch(1)) for b in theirs_table[: -(-TOKENS // sizes[0])]]
    blocks = [BlockId(b) for b in ours_table[: -(-TOKENS // sizes[1])]]
    key = DigestKey(plan, compatibility="c", ticket=TICKET, prompt=range(TOKENS))
    by_rank = [key.offered(r, LAYERS, 0, refs, pools[r].numpy().data) for r in source.ranks]
    digests = (b"".join(ranks) for ranks in zip(*by_rank, strict=True))
    offered = [OfferedBlock(ref, digest) for ref, digest in zip(refs, digests, strict=True)]

    for rank in target.ranks:
        numbers = range(plan.num_units(tokens))
        staging = plan.landing(rank, LAYERS).layout
        staged = np.zeros(len(numbers) * staging.block_bytes, np.uint8)
        turn = plan.turn(TICKET)
        source_blocks = [ref.block for ref in refs]
        reads = plan.reads(rank, LAYERS, tokens, source_blocks, numbers, turn=turn)
        for origin, runs in reads.items():
            for local, remote, length in map(astuple, runs):
                staged[local : local + length] = pools[origin].numpy()[remote : remote + length]
        assert key.first_wrong(rank, LAYERS, tokens, offered, numbers, staged.data) is None
        check_converted(plan, rank, torch.from_numpy(staged), blocks, truth)


def check_converted(
    plan: TransferPlan, rank: Rank, staged: Tensor, blocks: list[BlockId], truth: Tensor
) -> None:
    shard = plan.target.shard(rank)
    pool = torch.zeros(NUM_BLOCKS * shard.layout.block_bytes, dtype=torch.uint8)
    conversion = plan.conversion(rank, LAYERS, TokenRange(0, TOKENS), blocks)
    convert_kv(
        staged,
        conversion.staging,
        pool,
        conversion.target,
        conversion.blocks,
        tokens=conversion.tokens,
        first_layer=conversion.first_layer,
        first_slot=conversion.first_slot,
    )
    found = decoded(pool, shard.layout)[blocks][:, LAYERS.start : LAYERS.end]
    by_token = found.movedim(4, 1).flatten(0, 1)[:TOKENS]
    wanted = truth[LAYERS.start : LAYERS.end, :, shard.heads.start : shard.heads.end].movedim(3, 0)
    error = ERROR[plan.source.model.dtype] + ERROR[plan.target.model.dtype]
    assert torch.all((by_token - wanted).abs() <= error * wanted.abs() + error * 2.0**-6)
