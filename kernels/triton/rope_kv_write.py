"""Norms q and k, turns them, and writes k and v to the pool: one pass over a step's qkv.

The arithmetic is float32 from the first load to the last store, so values round once.
"""

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.numbers import ceil_div, power_of_2, to_fp8

_VALUES = 2048  # that a program takes, in whole heads


def rope_kv_write_(
    qkv: Tensor,
    kv: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    norm_weights: Tensor | None = None,
    eps: float = 0.0,
    kv_scales: Tensor | None = None,
) -> None:
    """Turn q in place and write k, turned, and v to one layer of the pool.

    `qkv` is [tokens, heads + 2 kv_heads, head_dim], q before k before v; `kv` [num_blocks, 2,
    kv_heads, block_size, head_dim]; `slots` [tokens] int64 is block × block_size + offset of each
    token, -1 for rows that are padding. `cos` and `sin` [tokens, turned / 2] are float32, and turn
    the first `turned` dimensions by halves (kernels/rope.py). With `norm_weights` [heads +
    kv_heads, head_dim], each head of q and k is first divided by its root mean square. A pool in
    fp8 gets the values divided by `kv_scales` [num_blocks, 2, kv_heads] float32, of any strides.
    """
    tokens, rows, head_dim = qkv.shape
    kv_heads, block_size = kv.shape[2:4]
    assert kv.stride()[3:] == (head_dim, 1), "tokens of a block must lie together"
    half = cos.shape[1]
    s_scale = (0, 0, 0) if kv_scales is None else kv_scales.stride()
    block_h = min(power_of_2(rows), max(1, _VALUES // power_of_2(head_dim)))
    _rope_kv_write[(tokens, ceil_div(rows, block_h))](
        qkv,
        kv,
        slots,
        cos,
        sin,
        norm_weights,
        kv_scales,
        eps,
        qkv.stride(0),
        qkv.stride(1),
        cos.stride(0),
        sin.stride(0),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        *s_scale,
        HEADS=rows - 2 * kv_heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        HALF=half,
        REST=head_dim - 2 * half,
        PAGE=block_size,
        BLOCK_H=block_h,
        BLOCK_HALF=power_of_2(half),
        BLOCK_REST=power_of_2(head_dim - 2 * half),
        FP8=kv.element_size() == 1,
        num_warps=4,
    )


@triton.jit
def _rope_kv_write(
    qkv,
    kv,
    slots,
    cos,
    sin,
    norm_weights,
    kv_scales,
    eps,
    s_token,
    s_row,
    s_cos,
    s_sin,
    s_block,
    s_part,
    s_head,
    s_sblock,
    s_spart,
    s_shead,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    FP8: tl.constexpr,
):
    token = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.load(slots + token)
    d = tl.arange(0, BLOCK_HALF)
    is_v = (row >= HEADS + KV_HEADS)[:, None]
    there = (row < HEADS + 2 * KV_HEADS)[:, None]
    turned = there & (d < HALF)[None, :]
    source = qkv + token.to(tl.int64) * s_token + row[:, None] * s_row
    x = tl.load(source + d[None, :], mask=turned, other=0.0).to(tl.float32)
    y = tl.load(source + HALF + d[None, :], mask=turned, other=0.0).to(tl.float32)
    if REST > 0:
        r = tl.arange(0, BLOCK_REST)
        kept = there & (r < REST)[None, :]
        z = tl.load(source + 2 * HALF + r[None, :], mask=kept, other=0.0).to(tl.float32)
    if norm_weights is not None:
        squares = tl.sum(x * x + y * y, 1)
        if REST > 0:
            squares += tl.sum(z * z, 1)
        scale = tl.where(is_v, 1.0, tl.rsqrt(squares / D + eps)[:, None])
        weight = norm_weights + row[:, None] * D
        x *= scale * tl.load(weight + d[None, :], mask=turned & ~is_v, other=1.0).to(tl.float32)
        y *= scale * tl.load(weight + HALF + d[None, :], mask=turned & ~is_v, other=1.0).to(
            tl.float32
        )
        if REST > 0:
            z *= scale * tl.load(weight + 2 * HALF + r[None, :], mask=kept & ~is_v, other=1.0).to(
                tl.float32
            )
    c = tl.load(cos + token * s_cos + d, mask=d < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * s_sin + d, mask=d < HALF, other=0.0)[None, :]
    first = tl.where(is_v, x, x * c - y * s)
    second = tl.where(is_v, y, y * c + x * s)
    is_q = (row < HEADS)[:, None]
    kind = qkv.dtype.element_ty
    tl.store(source + d[None, :], first.to(kind), mask=turned & is_q)
    tl.store(source + HALF + d[None, :], second.to(kind), mask=turned & is_q)
    if REST > 0 and norm_weights is not None:
        tl.store(source + 2 * HALF + r[None, :], z.to(kind), mask=kept & is_q)
    # The pool: row HEADS + part * KV_HEADS + head.
    part_row = tl.maximum(row - HEADS, 0)
    new = there & ~is_q & (slot >= 0)
    block = tl.maximum(slot, 0) // PAGE
    if kv_scales is not None:
        at = kv_scales + block * s_sblock
        at += part_row // KV_HEADS * s_spart + part_row % KV_HEADS * s_shead
        by = tl.load(at, mask=part_row < 2 * KV_HEADS, other=1.0)[:, None]
        first /= by
        second /= by
        if REST > 0:
            z /= by
    if not FP8:  # as it would be in qkv
        first = first.to(kind)
        second = second.to(kind)
    place = block * s_block + (part_row // KV_HEADS * s_part + part_row % KV_HEADS * s_head)
    target = kv + (place + tl.maximum(slot, 0) % PAGE * D)[:, None]
    tl.store(target + d[None, :], _stored(first, kv, FP8), mask=new & turned)
    tl.store(target + HALF + d[None, :], _stored(second, kv, FP8), mask=new & turned)
    if REST > 0:
        tl.store(target + 2 * HALF + r[None, :], _stored(z, kv, FP8), mask=new & kept)


@triton.jit
def _stored(x, kv, FP8: tl.constexpr):
    return to_fp8(x) if FP8 else x.to(kv.dtype.element_ty)
