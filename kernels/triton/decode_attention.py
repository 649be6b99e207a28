"""Attention of one new token per sequence over the paged pool, in parts that are put together.

A program takes one item of the plan (decode_plan.py) for the query heads of one KV head: it reads
the item's keys and values once, and keeps a running maximum and sum (FlashDecoding: Dao et al.,
2023). Scores are in units of log2, because the GPU's exponential is exp2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.attention_scores import Scoring
from baton.kernels.triton.decode_combine import combine
from baton.kernels.triton.decode_plan import TILE, DecodePlan, item_bounds, partials
from baton.kernels.triton.numbers import LOG2E, Tile, ceil_div, power_of_2, tanh

# By padded head_dim and bytes of a stored value.
_TILES = {
    (64, 2): Tile(64, 4, 4),
    (128, 2): Tile(64, 4, 3),
    (256, 2): Tile(32, 4, 3),
    (64, 1): Tile(64, 4, 4),
    (128, 1): Tile(64, 4, 3),
    (256, 1): Tile(32, 4, 3),
}
_WIDE = Tile(32, 4, 2)
_MOST_HEADS = 64  # that one program takes; queries and sums of more would not stay in registers


def decode_programs(heads: int, kv_heads: int) -> int:
    """Return how many programs an item has, as `plan_decode` wants to know it."""
    group = heads // kv_heads
    return kv_heads * ceil_div(group, _head_block(group))


def decode_attention(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    plan: DecodePlan,
    scoring: Scoring,
    kv_scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the attention output [rows, heads, head_dim] of q of that shape, one token a row.

    `kv` is one layer of the pool, [num_blocks, 2, kv_heads, block_size, head_dim] (strides of
    blocks, parts and heads are free), with the new tokens' KV in it, and `tables` [rows, blocks]
    int32. KV in fp8 stands for itself times `kv_scales` [num_blocks, 2, kv_heads] float32, of any
    strides. Rows of length 0 give 0. The result is put in `out`, contiguous, if that is given.
    """
    rows, heads, head_dim = q.shape
    kv_heads, block_size = kv.shape[2:4]
    assert plan.programs == decode_programs(heads, kv_heads), "the plan is for other heads"
    assert kv.stride()[3:] == (head_dim, 1), "tokens of a block must lie together"
    group = heads // kv_heads
    block_h = _head_block(group)
    block_d = max(16, power_of_2(head_dim))
    tile = _TILES.get((block_d, kv.element_size()), _WIDE)
    if out is None:
        out = torch.empty(rows, heads, head_dim, dtype=q.dtype, device=q.device)
    s_scale = (0, 0, 0) if kv_scales is None else kv_scales.stride()
    found, weights = partials(plan, heads, head_dim)
    _attend[(plan.items.shape[0], kv_heads, ceil_div(group, block_h))](
        q,
        kv,
        tables,
        plan.lengths,
        plan.items,
        plan.firsts,
        plan.span,
        scoring.sinks,
        kv_scales,
        found,
        weights,
        out,
        scoring.scale,
        scoring.softcap or 0.0,
        plan.window or 0,
        heads,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        tables.stride(0),
        *s_scale,
        GROUP=group,
        BLOCK_H=block_h,
        D=head_dim,
        BLOCK_D=block_d,
        PAGE=block_size,
        TILE=TILE,
        BLOCK_N=tile.block,
        CAPPED=scoring.softcap is not None,
        LOG2E=LOG2E,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    combine(found, weights, plan, scoring.sinks, out)
    return out


def _head_block(group: int) -> int:
    """Tensor cores take 16 rows at least."""
    return min(max(16, power_of_2(group)), _MOST_HEADS)


@triton.jit(do_not_specialize=["window"])
def _attend(
    q,
    kv,
    tables,
    lengths,
    items,
    firsts,
    span,
    sinks,
    kv_scales,
    found,
    weights,
    out,
    scale,
    softcap,
    window,
    heads,
    s_qrow,
    s_qhead,
    s_block,
    s_part,
    s_head,
    s_table,
    s_sblock,
    s_spart,
    s_shead,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    LOG2E: tl.constexpr,
):
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    row, begin, end, low = item_bounds(items, lengths, span, window, item, TILE)
    if row < 0:
        return
    begin = tl.maximum(begin, low // BLOCK_N * BLOCK_N)
    within = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + within
    d = tl.arange(0, BLOCK_D)
    valid = (within < GROUP)[:, None] & (d < D)[None, :]
    query = tl.load(
        q + row.to(tl.int64) * s_qrow + head[:, None] * s_qhead + d[None, :], mask=valid, other=0.0
    )
    keys = kv + kv_head * s_head
    values = keys + s_part
    highest = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        here = n < end
        block = tl.load(tables + row * s_table + n // PAGE, mask=here, other=0).to(tl.int64)
        place = block * s_block + n % PAGE * D
        k = tl.load(
            keys + place[None, :] + d[:, None], mask=here[None, :] & (d < D)[:, None], other=0.0
        )
        scores = tl.dot(query, k.to(query.dtype), input_precision="ieee") * scale
        if kv_scales is not None:
            by = kv_scales + block * s_sblock + kv_head * s_shead
            scores *= tl.load(by, mask=here, other=0.0)[None, :]
        if CAPPED:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where((here & (n >= low))[None, :], scores * LOG2E, -float("inf"))
        v = tl.load(
            values + place[:, None] + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0
        )
        # No maximum is -inf: each tile has a token in sight.
        new = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp2(scores - new[:, None])
        kept = tl.exp2(highest - new)
        total = total * kept + tl.sum(shares, 1)
        if kv_scales is not None:
            shares *= tl.load(by + s_spart, mask=here, other=0.0)[None, :]
        acc = tl.dot(
            shares.to(query.dtype),
            v.to(query.dtype),
            acc * kept[:, None],
            input_precision="ieee",
        )
        highest = new
    if tl.load(firsts + row + 1) - tl.load(firsts + row) == 1:  # all of the row is here
        if sinks is not None:
            sink = tl.load(sinks + head, mask=within < GROUP, other=0.0).to(tl.float32) * LOG2E
            new = tl.maximum(highest, sink)
            acc *= tl.exp2(highest - new)[:, None]
            total = total * tl.exp2(highest - new) + tl.exp2(sink - new)
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        written = out + (row * heads + head).to(tl.int64)[:, None] * D + d[None, :]
        tl.store(written, result.to(out.dtype.element_ty), mask=valid)
    else:
        place = (item * heads + head).to(tl.int64)
        tl.store(found + place[:, None] * D + d[None, :], acc / total[:, None], mask=valid)
        tl.store(weights + place, highest + tl.log2(total), mask=within < GROUP)
