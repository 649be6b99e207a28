"""Decode attention of multi-head latent attention, whose heads all see the same vectors.

A token's vector is [latent | turned]: all of it is the key, the latent alone is the value, so it
is read once for both. A program takes a block of heads; spans are planned and put together as for
other attention (decode_plan.py, decode_combine.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.attention_scores import Scoring
from baton.kernels.triton.decode_combine import combine
from baton.kernels.triton.decode_plan import TILE, DecodePlan, item_bounds, partials
from baton.kernels.triton.numbers import LOG2E, Tile, ceil_div, power_of_2

# By heads of a program: keys, warps, stages.
_TILES = {16: Tile(32, 4, 2), 32: Tile(32, 8, 2), 64: Tile(32, 8, 2)}


def mla_programs(heads: int, stored: torch.dtype) -> int:
    """Return how many programs an item has, as `plan_decode` wants it, for KV of that dtype."""
    return ceil_div(heads, _head_block(heads, stored))


def mla_decode(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    plan: DecodePlan,
    scoring: Scoring,
    *,
    rank: int,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Return what the heads see, [rows, heads, rank], for q [rows, heads, rank + turned].

    `kv` is one layer of the pool, [num_blocks, 1, 1, block_size, rank + turned], with the new
    tokens' vectors in it, and `tables` [rows, blocks] int32. `rank` is a power of 2. Vectors in
    fp8 stand for themselves times `kv_scales` [num_blocks, 1, 1] float32, of any strides.
    """
    rows, heads, width = q.shape
    block_size = kv.shape[3]
    assert kv.stride()[3:] == (width, 1), "tokens of a block must lie together"
    assert power_of_2(rank) == rank, f"rank {rank} is no power of 2"
    assert plan.programs == mla_programs(heads, kv.dtype), "the plan is for other heads"
    assert scoring.fused
    block_h = _head_block(heads, kv.dtype)
    tile = _TILES[block_h]
    out = torch.empty(rows, heads, rank, dtype=q.dtype, device=q.device)
    found, weights = partials(plan, heads, rank)
    _attend[(plan.items.shape[0], plan.programs)](
        q,
        kv,
        tables,
        plan.lengths,
        plan.items,
        plan.firsts,
        plan.span,
        kv_scales,
        found,
        weights,
        out,
        scoring.scale,
        plan.window or 0,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        tables.stride(0),
        0 if kv_scales is None else kv_scales.stride(0),
        HEADS=heads,
        BLOCK_H=block_h,
        RANK=rank,
        TURNED=width - rank,
        BLOCK_TURNED=max(16, power_of_2(width - rank)),
        PAGE=block_size,
        TILE=TILE,
        BLOCK_N=tile.block,
        LOG2E=LOG2E,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    combine(found, weights, plan, None, out)
    return out


def _head_block(heads: int, stored: torch.dtype) -> int:
    """Vectors in fp8 are in registers twice, as stored and as used: 64 heads would spill."""
    return min(max(16, power_of_2(heads)), 32 if stored.itemsize == 1 else 64)


@triton.jit(do_not_specialize=["window"])
def _attend(
    q,
    kv,
    tables,
    lengths,
    items,
    firsts,
    span,
    kv_scales,
    found,
    weights,
    out,
    scale,
    window,
    s_qrow,
    s_qhead,
    s_block,
    s_table,
    s_scale,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_TURNED: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG2E: tl.constexpr,
):
    item = tl.program_id(0)
    row, begin, end, low = item_bounds(items, lengths, span, window, item, TILE)
    if row < 0:
        return
    begin = tl.maximum(begin, low // BLOCK_N * BLOCK_N)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    here_h = (head < HEADS)[:, None]
    d = tl.arange(0, RANK)
    t = tl.arange(0, BLOCK_TURNED)
    source = q + row.to(tl.int64) * s_qrow + head[:, None] * s_qhead
    query = tl.load(source + d[None, :], mask=here_h, other=0.0)
    turned = tl.load(source + RANK + t[None, :], mask=here_h & (t < TURNED)[None, :], other=0.0)
    scale *= LOG2E
    highest = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, RANK], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        here = n < end
        block = tl.load(tables + row * s_table + n // PAGE, mask=here, other=0).to(tl.int64)
        place = kv + block * s_block + n % PAGE * (RANK + TURNED)
        latent = tl.load(place[:, None] + d[None, :], mask=here[:, None], other=0.0)
        latent = latent.to(query.dtype)
        key = tl.load(
            place[None, :] + RANK + t[:, None],
            mask=here[None, :] & (t < TURNED)[:, None],
            other=0.0,
        )
        scores = tl.dot(query, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(turned, key.to(query.dtype), scores, input_precision="ieee") * scale
        if kv_scales is not None:
            by = tl.load(kv_scales + block * s_scale, mask=here, other=0.0)[None, :]
            scores *= by
        scores = tl.where((here & (n >= low))[None, :], scores, -float("inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - new[:, None])
        kept = tl.exp2(highest - new)
        total = total * kept + tl.sum(shares, 1)
        if kv_scales is not None:
            shares *= by
        acc = tl.dot(shares.to(query.dtype), latent, acc * kept[:, None], input_precision="ieee")
        highest = new
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if tl.load(firsts + row + 1) - tl.load(firsts + row) == 1:  # all of the row is here
        written = out + (row * HEADS + head).to(tl.int64)[:, None] * RANK + d[None, :]
        tl.store(written, acc.to(out.dtype.element_ty), mask=here_h)
    else:
        place_h = (item * HEADS + head).to(tl.int64)
        tl.store(found + place_h[:, None] * RANK + d[None, :], acc, mask=here_h)
        tl.store(weights + place_h, highest + tl.log2(total), mask=head < HEADS)
