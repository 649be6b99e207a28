"""Gathers runs of the pool's blocks into one stretch of memory, and scatters them back.

A handover wants parts of many blocks: whole blocks, a group of layers, or a range of heads of each
layer. Where these runs are short, one copy of a staged stretch is faster than many small ones.

    pool     [block][layer][part][ head head HEAD HEAD ]     runs of HEAD HEAD, for some layers
    staged   [block][layer][part][ HEAD HEAD ]               of some blocks, side by side
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.numbers import ceil_div

_BLOCK = 2048  # words of 4 bytes that a program copies


def gather_blocks(part: Tensor, blocks: Tensor, staged: Tensor) -> None:
    """Copy part[blocks] to `staged`.

    `part` is a view of the pool, [num_blocks, layers, parts, heads, block_size, head_dim], cut to
    the layers and heads that are wanted; `blocks` [n] int32, -1 for none; `staged` [n, layers,
    parts, heads, block_size, head_dim], contiguous. Runs and their places are in whole 4 bytes.
    """
    _copy(part, blocks, staged, out_of_pool=True)


def scatter_blocks(part: Tensor, blocks: Tensor, staged: Tensor) -> None:
    """Copy `staged` to part[blocks], the way back of `gather_blocks`."""
    _copy(part, blocks, staged, out_of_pool=False)


def _copy(part: Tensor, blocks: Tensor, staged: Tensor, *, out_of_pool: bool) -> None:
    count, layers, parts, heads, block_size, head_dim = staged.shape
    run = heads * block_size * head_dim
    assert staged.is_contiguous()
    assert part.shape[1:] == staged.shape[1:]
    assert part.stride()[3:] == (block_size * head_dim, head_dim, 1), "only whole heads"
    assert run * staged.element_size() % 4 == 0
    assert part.stride(2) * staged.element_size() % 4 == 0
    per_word = 4 // staged.element_size()
    _move[(count, layers * parts, ceil_div(run // per_word, _BLOCK))](
        part.view(torch.int32),
        blocks,
        staged.view(torch.int32),
        run // per_word,
        parts,
        part.stride(0) // per_word,
        part.stride(1) // per_word,
        part.stride(2) // per_word,
        GATHER=out_of_pool,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit
def _move(
    part,
    blocks,
    staged,
    run,
    parts,
    s_block,
    s_layer,
    s_part,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1) // parts
    side = tl.program_id(1) % parts
    block = tl.load(blocks + i).to(tl.int64)
    if block < 0:
        return
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there = word < run
    at = part + block * s_block + layer * s_layer + side * s_part + word
    kept = staged + (i * tl.num_programs(1) + tl.program_id(1)) * run + word
    if GATHER:
        tl.store(kept, tl.load(at, mask=there), mask=there)
    else:
        tl.store(at, tl.load(kept, mask=there), mask=there)
