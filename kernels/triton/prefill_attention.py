"""Causal attention of prompt chunks over the paged pool, several sequences in one launch.

A chunk's queries are the last tokens of their sequence; what stands before them, of this prompt or
of a cached prefix, is in the pool like themselves. A program takes a tile of one chunk's queries
for one head, and passes over the keys in three parts, of which only the outer two need a mask:

    keys     | window's edge | seen by all rows of the tile | diagonal |

The grid depends on the number of tokens and sequences only; a program finds its chunk by itself.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.attention_scores import Scoring
from baton.kernels.triton.numbers import LOG2E, Tile, ceil_div, power_of_2, tanh

# By padded head_dim: rows of a tile, then keys, warps, stages. 128 rows on 4 warps would spill.
_TILES = {
    64: (128, Tile(64, 4, 3)),
    128: (128, Tile(64, 8, 3)),
    256: (64, Tile(32, 4, 3)),
}
# With scales, or with tiles left out, 256 dimensions on 4 warps would spill too.
_WIDE = (64, Tile(32, 8, 2))


def prefill_attention(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scoring: Scoring,
    *,
    window: int | None = None,
    kv_scales: Tensor | None = None,
    skip_below: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return the attention output [tokens, heads, head_dim] of q of that shape.

    `kv` is one layer of the pool, [num_blocks, 2, kv_heads, block_size, head_dim], with the new
    tokens' KV in it, and `tables` [sequences, blocks] int32. `starts` [sequences + 1] int32 says
    which rows of q are whose, and `lengths` [sequences] int32 how long the sequences are with
    them. A row sees `window` tokens at most, its own included. KV in fp8 stands for itself times
    `kv_scales` [num_blocks, 2, kv_heads] float32, of any strides. Rows after the last start are not
    written. The result is put in `out`, contiguous, if that is given.

    A tile of keys is left out where the share of each key in it would be less than `skip_below` of
    that of the likeliest key so far, for all rows of the tile (BLASST: Yuan et al., 2025). What is
    left out of a row is then at most e = n × skip_below of its weight, n being the keys it sees,
    and its output is off by at most 2 × e × the largest |value|; measured errors are far less. 0
    leaves nothing out.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, block_size = kv.shape[2:4]
    assert kv.stride()[3:] == (head_dim, 1), "tokens of a block must lie together"
    sequences = lengths.shape[0]
    block_d = max(16, power_of_2(head_dim))
    rows, tile = _TILES.get(block_d, _WIDE)
    if block_d > 128 and (kv_scales is not None or skip_below > 0):
        rows, tile = _WIDE
    if out is None:
        out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    s_scale = (0, 0, 0) if kv_scales is None else kv_scales.stride()
    _attend[(ceil_div(tokens, rows) + sequences, heads)](
        q,
        kv,
        tables,
        starts,
        lengths,
        scoring.sinks,
        kv_scales,
        out,
        scoring.scale,
        scoring.softcap or 0.0,
        window or 0,
        sequences,
        math.log2(skip_below) if skip_below > 0 else 0.0,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        tables.stride(0),
        *s_scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        BLOCK_D=block_d,
        PAGE=block_size,
        BLOCK_M=rows,
        BLOCK_N=tile.block,
        WINDOWED=window is not None,
        CAPPED=scoring.softcap is not None,
        SKIPPING=skip_below > 0,
        LOG2E=LOG2E,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@triton.jit
def _find(starts, sequences, tile, BLOCK_M: tl.constexpr):
    """Return the sequence of a tile: each has its rows / BLOCK_M tiles, rounded up, or one more."""
    low = 0
    high = sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(starts + middle) // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit(do_not_specialize=["sequences", "window"])
def _attend(
    q,
    kv,
    tables,
    starts,
    lengths,
    sinks,
    kv_scales,
    out,
    scale,
    softcap,
    window,
    sequences,
    least,
    s_qrow,
    s_qhead,
    s_block,
    s_part,
    s_head,
    s_table,
    s_sblock,
    s_spart,
    s_shead,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SKIPPING: tl.constexpr,
    LOG2E: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles see most keys: they go first
    head = tl.program_id(1)
    sequence = _find(starts, sequences, tile, BLOCK_M)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    first = (tile - start // BLOCK_M - sequence) * BLOCK_M
    if first >= count:
        return
    before = tl.load(lengths + sequence) - count
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    valid = (m < count)[:, None] & (d < D)[None, :]
    at = q + (start + m).to(tl.int64)[:, None] * s_qrow + head * s_qhead + d[None, :]
    query = tl.load(at, mask=valid, other=0.0)
    kv_head = head // (HEADS // KV_HEADS)
    scales = kv_scales
    if kv_scales is not None:
        scales += kv_head * s_shead
    keys = kv + kv_head * s_head
    table = tables + sequence * s_table
    end = before + tl.minimum(first + BLOCK_M, count)
    # Keys from `low` on are seen by some row, from `clear` to `diagonal` by all.
    low = 0
    clear = 0
    if WINDOWED:
        low = tl.maximum(before + first + 1 - window, 0) // BLOCK_N * BLOCK_N
        clear = tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N
    diagonal = (before + first + 1) // BLOCK_N * BLOCK_N
    clear = tl.minimum(clear, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    diagonal = tl.maximum(diagonal, clear)
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    state = (highest, total, acc)
    if WINDOWED:
        for n in range(low, clear, BLOCK_N):
            state = _tile(
                state, query, keys, scales, table, before + m, n, end, scale, softcap, window,
                least, s_block, s_part, s_sblock, s_spart, D, BLOCK_D, PAGE, BLOCK_N, True,
                WINDOWED, CAPPED, SKIPPING, LOG2E,
            )  # fmt: skip
    for n in range(clear, diagonal, BLOCK_N):
        state = _tile(
            state, query, keys, scales, table, before + m, n, end, scale, softcap, window, least,
            s_block, s_part, s_sblock, s_spart, D, BLOCK_D, PAGE, BLOCK_N, False, WINDOWED,
            CAPPED, SKIPPING, LOG2E,
        )  # fmt: skip
    for n in range(diagonal, end, BLOCK_N):
        state = _tile(
            state, query, keys, scales, table, before + m, n, end, scale, softcap, window, least,
            s_block, s_part, s_sblock, s_spart, D, BLOCK_D, PAGE, BLOCK_N, True, WINDOWED,
            CAPPED, SKIPPING, LOG2E,
        )  # fmt: skip
    highest, total, acc = state
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        new = tl.maximum(highest, sink)
        acc *= tl.exp2(highest - new)[:, None]
        total = total * tl.exp2(highest - new) + tl.exp2(sink - new)
    place = ((start + m).to(tl.int64) * HEADS + head)[:, None] * D + d[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _tile(
    state,
    query,
    keys,
    scales,
    table,
    places,
    start,
    end,
    scale,
    softcap,
    window,
    least,
    s_block,
    s_part,
    s_sblock,
    s_spart,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SKIPPING: tl.constexpr,
    LOG2E: tl.constexpr,
):
    """Take a tile of keys into the running maximum, sum and output of a tile of queries."""
    highest, total, acc = state
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    here = n < end
    block = tl.load(table + n // PAGE, mask=here, other=0).to(tl.int64)
    place = block * s_block + n % PAGE * D
    at = keys + place[None, :] + d[:, None]
    k = tl.load(at, mask=here[None, :] & (d < D)[:, None], other=0.0).to(query.dtype)
    scores = tl.dot(query, k, input_precision="ieee") * scale
    if scales is not None:
        scores *= tl.load(scales + block * s_sblock, mask=here, other=0.0)[None, :]
    if CAPPED:
        scores = softcap * tanh(scores / softcap)
    scores *= LOG2E
    if MASKED:
        seen = n[None, :] <= places[:, None]
        if WINDOWED:
            seen &= n[None, :] > places[:, None] - window
        scores = tl.where(seen, scores, -float("inf"))
    top = tl.max(scores, 1)
    at = keys + s_part + place[:, None] + d[None, :]
    mask = here[:, None] & (d < D)[None, :]
    by = None
    if scales is not None:
        by = tl.load(scales + block * s_sblock + s_spart, mask=here, other=0.0)
    if SKIPPING:  # where all rows' keys are negligible beside what they have seen
        if tl.max((top - highest >= least).to(tl.int32), 0) > 0:
            highest, total, acc = _take(
                state, scores, top, at, mask, by, MASKED and WINDOWED, query.dtype
            )
    else:
        highest, total, acc = _take(
            state, scores, top, at, mask, by, MASKED and WINDOWED, query.dtype
        )
    return highest, total, acc


@triton.jit
def _take(state, scores, top, values, mask, scales, MAY_BE_NONE: tl.constexpr, KIND: tl.constexpr):
    """Take scores in units of log2, and the values that they are of, into a running state."""
    highest, total, acc = state
    new = tl.maximum(highest, top)
    base = new
    if MAY_BE_NONE:  # a row may not have seen a key yet
        base = tl.where(new == -float("inf"), 0.0, new)
    shares = tl.exp2(scores - base[:, None])
    kept = tl.exp2(highest - base)
    v = tl.load(values, mask=mask, other=0.0)
    total = total * kept + tl.sum(shares, 1)
    if scales is not None:
        shares *= scales[None, :]
    acc = tl.dot(shares.to(KIND), v.to(KIND), acc * kept[:, None], input_precision="ieee")
    return new, total, acc
