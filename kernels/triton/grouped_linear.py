"""A linear layer of each expert, over the tokens that visit it: one launch for all experts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.moe_routing import ExpertOrder
from baton.kernels.triton.numbers import Tile, ceil_div
from baton.kernels.triton.weight_formats import MX_GROUP

# By rows of a tile, then outputs, warps, stages.
_TILES = {16: Tile(64, 4, 4), 64: Tile(128, 4, 3), 128: Tile(128, 8, 3)}
# Of MXFP4, whose values are in registers twice: 128 rows by 128 outputs would spill.
_MX_TILES = {16: Tile(64, 4, 4), 64: Tile(64, 4, 3), 128: Tile(64, 8, 3)}
_INPUTS = {16: 128, 64: 64, 128: 64}


def tile_rows(slots: int, experts: int) -> int:
    """Return how many slots a tile should have, for the mean number of visits of an expert."""
    mean = slots / experts
    return 16 if mean <= 16 else 64 if mean <= 128 else 128


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    order: ExpertOrder,
    *,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return [slots, out]: each slot's row times its expert's matrix.

    `x` is [tokens, in], and serves all slots of a token, or [slots, in]. `weight` [experts, out,
    in] has x's dtype, or is one of weight_formats.py with its `scales`: float8 or int8 with
    [experts, out], or MXFP4 as uint8 [experts, out, bytes] with uint8 [experts, out, groups].
    `bias` is [experts, out]. `weights` [tokens, top_k] float32 are multiplied in: summing a token's
    slots then gives its output. Rows of slots that no expert here has are 0.
    """
    outputs, inputs = weight.shape[1], x.shape[1]
    packed = weight.dtype == torch.uint8
    assert x.stride(1) == weight.stride(2) == 1
    assert weight.shape[2] == (ceil_div(inputs, 2 * MX_GROUP) * MX_GROUP if packed else inputs)
    assert (scales is None) == (weight.dtype == x.dtype)
    per_slot = weights is not None
    slots = x.shape[0] * (1 if per_slot else order.top_k)
    tile = (_MX_TILES if packed else _TILES)[order.rows]
    out = torch.zeros(slots, outputs, dtype=x.dtype, device=x.device)
    _grouped[(order.experts.shape[0], ceil_div(outputs, tile.block))](
        x,
        weight,
        order.slots,
        order.experts,
        scales,
        bias,
        weights,
        out,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        SHARE=1 if per_slot else order.top_k,
        PACKED=packed,
        GROUP=MX_GROUP,
        BLOCK_M=order.rows,
        BLOCK_N=tile.block,
        BLOCK_K=_INPUTS[order.rows],
        EVEN=inputs % (2 * MX_GROUP if packed else _INPUTS[order.rows]) == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@triton.jit
def _grouped(
    x,
    weight,
    slots,
    experts,
    scales,
    bias,
    weights,
    out,
    outputs,
    inputs,
    s_x,
    s_expert,
    s_output,
    SHARE: tl.constexpr,
    PACKED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(experts + tile).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slots + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    here = (slot >= 0)[:, None]
    slot = tl.maximum(slot, 0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += (slot // SHARE)[:, None] * s_x
    weight += expert * s_expert + n.to(tl.int64)[None, :] * s_output
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    column = expert * outputs + n
    if PACKED:
        half = tl.arange(0, GROUP)
        groups = tl.cdiv(inputs, 2 * GROUP) * 2
        for start in range(0, inputs, 2 * GROUP):
            at = weight + (start // 2 + half)[:, None]
            pairs = tl.load(at, mask=(n < outputs)[None, :], other=0)
            k = start + half
            low = tl.load(x + k[None, :], mask=here & (EVEN | (k < inputs)[None, :]), other=0.0)
            k += GROUP
            high = tl.load(x + k[None, :], mask=here & (EVEN | (k < inputs)[None, :]), other=0.0)
            by = scales + column * groups + start // GROUP
            kind = low.dtype
            part = tl.dot(low, twice_e2m1(pairs & 15).to(kind), input_precision="ieee")
            acc += part * half_of_scale(tl.load(by, mask=n < outputs, other=0))[None, :]
            part = tl.dot(high, twice_e2m1(pairs >> 4).to(kind), input_precision="ieee")
            acc += part * half_of_scale(tl.load(by + 1, mask=n < outputs, other=0))[None, :]
    else:
        for start in range(0, inputs, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = tl.load(x + k[None, :], mask=here & (EVEN | (k < inputs)[None, :]), other=0.0)
            right = tl.load(
                weight + k[:, None],
                mask=(n < outputs)[None, :] & (EVEN | (k < inputs)[:, None]),
                other=0.0,
            )
            acc = tl.dot(left, right.to(left.dtype), acc, input_precision="ieee")
    if scales is not None and not PACKED:
        acc *= tl.load(scales + column, mask=n < outputs, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + column, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if weights is not None:
        acc *= tl.load(weights + slot)[:, None]
    at = out + slot[:, None] * outputs + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=here & (n < outputs)[None, :])


@triton.jit
def twice_e2m1(code):
    """Return 2 × the value of 4 bits: sign, two of exponent and one of mantissa; a whole number."""
    code = code.to(tl.int32)
    exponent = (code >> 1) & 3
    fraction = code & 1
    size = tl.where(exponent == 0, fraction, ((2 + fraction) << exponent) >> 1)
    return tl.where(code > 7, -size, size).to(tl.float32)


@triton.jit
def half_of_scale(byte):
    """Return 2 ** (byte - 128): half of the scale that an E8M0 byte stands for."""
    return tl.exp2(byte.to(tl.float32) - 128.0)
