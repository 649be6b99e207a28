"""y = x Wᵀ + b for few rows of x: a pass over W at the speed of memory.

The inputs are split where the outputs alone would not keep the GPU busy; a second kernel adds the
splits up in their order, so that results do not depend on who was first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.numbers import PROCESSORS, Tile, ceil_div, power_of_2
from baton.kernels.triton.weight_formats import GROUP

MOST_ROWS = 64
_INPUTS = 128  # of a tile
# By bits of a weight: outputs of a tile, warps, stages.
_TILES = {32: Tile(32, 4, 3), 16: Tile(64, 4, 4), 8: Tile(64, 4, 4), 4: Tile(64, 4, 4)}
_HALF_FULL = Tile(64, 4, 3)  # of 17 to 32 rows by weights of 16 bits: a stage more would spill


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """Return [rows, out] for x [rows, in] of up to 64 rows.

    `weight` [out, in] has x's dtype, or is one of weight_formats.py with its `scales`: float8 or
    int8 [out, in], int4 as uint8 [out, in / 2]. `bias` is [out]. Nibbles of int4 count from 8, or
    from `zeros` [out, in / 128] uint8.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    assert rows <= MOST_ROWS, f"{rows} rows; at most {MOST_ROWS}"
    assert x.stride(1) == weight.stride(1) == 1
    packed = weight.dtype == torch.uint8
    assert (scales is None) == (weight.dtype == x.dtype)
    assert zeros is None or packed
    block_m = max(16, power_of_2(rows))
    bits = 4 if packed else 8 * weight.element_size()
    tile = _HALF_FULL if (block_m, bits) == (32, 16) else _TILES[bits]
    columns = ceil_div(outputs, tile.block)
    splits = split_inputs(columns, inputs)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    sums = out
    if splits > 1:
        sums = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    _skinny[(columns, splits)](
        x,
        weight,
        scales,
        zeros,
        bias,
        sums,
        rows,
        outputs,
        inputs,
        x.stride(0),
        weight.stride(0),
        PER_SPLIT=ceil_div(ceil_div(inputs, _INPUTS), splits) * _INPUTS,
        SPLITS=splits,
        PACKED=packed,
        GROUP=GROUP,
        BLOCK_M=block_m,
        BLOCK_N=tile.block,
        BLOCK_K=_INPUTS,
        EVEN=inputs % _INPUTS == 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        block = 256
        _add_splits[(rows, ceil_div(outputs, block))](
            sums,
            None if packed else scales,
            bias,
            out,
            rows,
            outputs,
            SPLITS=splits,
            BLOCK=block,
            num_warps=2,
        )
    return out


def split_inputs(columns: int, inputs: int) -> int:
    """Return into how many parts to split the inputs: about two programs a processor."""
    splits = 1
    while columns * splits < 2 * PROCESSORS and inputs >= 4 * splits * _INPUTS:
        splits *= 2
    tiles = ceil_div(inputs, _INPUTS)
    return ceil_div(tiles, ceil_div(tiles, splits))  # so that none is empty


@triton.jit(do_not_specialize=["rows"])
def _skinny(
    x,
    weight,
    scales,
    zeros,
    bias,
    sums,
    rows,
    outputs,
    inputs,
    s_x,
    s_weight,
    PER_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    PACKED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    x += m * s_x
    weight += n.to(tl.int64) * s_weight
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = split * PER_SPLIT
    for start in range(begin, tl.minimum(begin + PER_SPLIT, inputs), BLOCK_K):
        if PACKED:
            half = tl.arange(0, GROUP // 2)
            pairs = tl.load(weight + (start // 2 + half)[:, None], mask=n < outputs, other=0)
            low = tl.load(x + (start + half)[None, :], mask=m < rows, other=0.0)
            high = tl.load(x + (start + GROUP // 2 + half)[None, :], mask=m < rows, other=0.0)
            w_low = ((pairs & 15).to(tl.int8) - 8).to(x.dtype.element_ty)
            w_high = ((pairs >> 4).to(tl.int8) - 8).to(x.dtype.element_ty)
            part = tl.dot(low, w_low, input_precision="ieee")
            part = tl.dot(high, w_high, part, input_precision="ieee")
            at = n * (inputs // GROUP) + start // GROUP
            if zeros is not None:  # (nibble - 8) + (8 - zero), the latter for all of the group
                zero = tl.load(zeros + at, mask=n < outputs, other=8).to(tl.float32)
                of_row = tl.sum(low.to(tl.float32), 1) + tl.sum(high.to(tl.float32), 1)
                part += of_row[:, None] * (8 - zero)
            acc += part * tl.load(scales + at, mask=n < outputs, other=0.0)
        else:
            k = start + tl.arange(0, BLOCK_K)
            left = tl.load(
                x + k[None, :], mask=(m < rows) & (EVEN | (k < inputs)[None, :]), other=0.0
            )
            right = tl.load(
                weight + k[:, None], mask=(n < outputs) & (EVEN | (k < inputs)[:, None]), other=0.0
            )
            acc = tl.dot(left, right.to(left.dtype), acc, input_precision="ieee")
    if SPLITS == 1:
        if scales is not None and not PACKED:
            acc *= tl.load(scales + n, mask=n < outputs, other=0.0)
        if bias is not None:
            acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    place = (split * rows + m) * outputs + n
    tl.store(sums + place, acc.to(sums.dtype.element_ty), mask=(m < rows) & (n < outputs))


@triton.jit(do_not_specialize=["rows"])
def _add_splits(
    sums,
    scales,
    bias,
    out,
    rows,
    outputs,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < outputs
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        total += tl.load(sums + (split * rows + row) * outputs + n, mask=there, other=0.0)
    if scales is not None:
        total *= tl.load(scales + n, mask=there, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + n, total.to(out.dtype.element_ty), mask=there)
