"""Norms and turns latents, writes them to the pool, and turns the queries: one launch.

A program takes one token: its latent, or the turned dimensions of some of its query heads.
"""

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.numbers import ceil_div, power_of_2, to_fp8

_HEADS = 32  # of a program


def latent_write_(
    latent: Tensor,
    q: Tensor,
    kv: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor,
    eps: float,
    kv_scales: Tensor | None = None,
) -> None:
    """Write [normed latent | turned] to one layer of the pool; turn the queries in place.

    `latent` is [tokens, rank + turned], q [tokens, heads, nope + turned], `weight` [rank], `kv`
    [num_blocks, 1, 1, block_size, rank + turned]; `slots` [tokens] int64, -1 for rows that are
    padding; `cos` and `sin` [tokens, turned / 2] float32. A pool in fp8 gets the vectors divided by
    `kv_scales` [num_blocks, 1, 1].
    """
    tokens, heads, width = q.shape
    half, rank = cos.shape[1], weight.shape[0]
    assert latent.shape[1] == kv.shape[4] == rank + 2 * half
    assert kv.stride()[3:] == (rank + 2 * half, 1), "tokens of a block must lie together"
    assert latent.stride(1) == q.stride(2) == 1
    _latent_write[(tokens, 1 + ceil_div(heads, _HEADS))](
        latent,
        q,
        kv,
        slots,
        cos,
        sin,
        weight,
        kv_scales,
        eps,
        latent.stride(0),
        q.stride(0),
        q.stride(1),
        cos.stride(0),
        sin.stride(0),
        kv.stride(0),
        0 if kv_scales is None else kv_scales.stride(0),
        HEADS=heads,
        NOPE=width - 2 * half,
        RANK=rank,
        BLOCK_RANK=power_of_2(rank),
        HALF=half,
        BLOCK_HALF=power_of_2(half),
        BLOCK_H=min(power_of_2(heads), _HEADS),
        PAGE=kv.shape[3],
        FP8=kv.element_size() == 1,
        num_warps=4,
    )


@triton.jit
def _latent_write(
    latent,
    q,
    kv,
    slots,
    cos,
    sin,
    weight,
    kv_scales,
    eps,
    s_latent,
    s_q,
    s_head,
    s_cos,
    s_sin,
    s_block,
    s_scale,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAGE: tl.constexpr,
    FP8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_HALF)
    in_half = t < HALF
    c = tl.load(cos + token * s_cos + t, mask=in_half, other=0.0)
    s = tl.load(sin + token * s_sin + t, mask=in_half, other=0.0)
    if tl.program_id(1) > 0:
        head = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (head < HEADS)[:, None] & in_half[None, :]
        at = q + token * s_q + head[:, None] * s_head + NOPE + t[None, :]
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        kind = q.dtype.element_ty
        tl.store(at, (x * c[None, :] - y * s[None, :]).to(kind), mask=mask)
        tl.store(at + HALF, (y * c[None, :] + x * s[None, :]).to(kind), mask=mask)
        return
    slot = tl.load(slots + token)
    if slot < 0:
        return
    kind = latent.dtype.element_ty
    d = tl.arange(0, BLOCK_RANK)
    source = latent + token * s_latent
    z = tl.load(source + d, mask=d < RANK, other=0.0).to(tl.float32)
    z *= tl.rsqrt(tl.sum(z * z, 0) / RANK + eps)
    z *= tl.load(weight + d, mask=d < RANK, other=0.0).to(tl.float32)
    x = tl.load(source + RANK + t, mask=in_half, other=0.0).to(tl.float32)
    y = tl.load(source + RANK + HALF + t, mask=in_half, other=0.0).to(tl.float32)
    first = x * c - y * s
    second = y * c + x * s
    if kv_scales is not None:
        by = tl.load(kv_scales + slot // PAGE * s_scale)
        z /= by
        first /= by
        second /= by
    if not FP8:  # as it would be in `latent`
        z = z.to(kind)
        first = first.to(kind)
        second = second.to(kind)
    target = kv + slot // PAGE * s_block + slot % PAGE * (RANK + 2 * HALF)
    tl.store(target + d, _stored(z, kv, FP8), mask=d < RANK)
    tl.store(target + RANK + t, _stored(first, kv, FP8), mask=in_half)
    tl.store(target + RANK + HALF + t, _stored(second, kv, FP8), mask=in_half)


@triton.jit
def _stored(x, kv, FP8: tl.constexpr):
    return to_fp8(x) if FP8 else x.to(kv.dtype.element_ty)
