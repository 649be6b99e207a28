"""A linear layer of each expert, over the tokens that visit it: one launch for all experts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.moe_routing import ExpertOrder
from baton.kernels.triton.numbers import Tile, ceil_div

# By rows of a tile, then outputs, warps, stages.
_TILES = {16: Tile(64, 4, 4), 64: Tile(128, 4, 3), 128: Tile(128, 8, 3)}
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

    `x` is [tokens, in], and serves all slots of a token, or [slots, in]; `weight` [experts, out,
    in] has x's dtype, or is float8 or int8 with `scales` [experts, out] (weight_formats.py);
    `bias` is [experts, out]. `weights` [tokens, top_k] float32 are multiplied in: summing a
    token's slots then gives its output. Rows of slots that no expert here has are 0.
    """
    _, outputs, inputs = weight.shape
    assert x.stride(1) == weight.stride(2) == 1
    assert (scales is None) == (weight.dtype == x.dtype)
    per_slot = weights is not None
    slots = x.shape[0] * (1 if per_slot else order.top_k)
    tile = _TILES[order.rows]
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
        BLOCK_M=order.rows,
        BLOCK_N=tile.block,
        BLOCK_K=_INPUTS[order.rows],
        EVEN=inputs % _INPUTS[order.rows] == 0,
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
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(x + k[None, :], mask=here & (EVEN | (k < inputs)[None, :]), other=0.0)
        right = tl.load(
            weight + k[:, None],
            mask=(n < outputs)[None, :] & (EVEN | (k < inputs)[:, None]),
            other=0.0,
        )
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision="ieee")
    column = expert * outputs + n
    if scales is not None:
        acc *= tl.load(scales + column, mask=n < outputs, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + column, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if weights is not None:
        acc *= tl.load(weights + slot)[:, None]
    at = out + slot[:, None] * outputs + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=here & (n < outputs)[None, :])
