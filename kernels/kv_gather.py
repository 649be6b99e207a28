"""Brings a range of layers of scattered blocks of a pool together, so that one copy moves them."""

import torch
from torch import Tensor

from baton.core.ids import BlockId
from baton.core.kv_layout import KVLayout, LayerRange


def gather_kv(pool: Tensor, layout: KVLayout, blocks: Tensor, layers: LayerRange) -> Tensor:
    """Return the bytes of `layers` of blocks [n] (int64), [n, len(layers) × layer_bytes] (uint8).

    `pool` [num_blocks × block_bytes] is bytes (uint8) on the same device as `blocks`. On CUDA a
    Triton kernel does it, elsewhere torch.
    """
    start, size = layout.run(BlockId(0), layers)
    if pool.is_cuda:
        return gather_by_kernel(pool, layout, blocks, layers)
    return torch.index_select(pool.view(-1, layout.block_bytes)[:, start : start + size], 0, blocks)


def gather_by_kernel(pool: Tensor, layout: KVLayout, blocks: Tensor, layers: LayerRange) -> Tensor:
    """Return what `gather_kv` does, by Triton."""
    from baton.kernels.triton.block_copy import gather_blocks

    # As words, and as one head: a layer of a block is one run, whatever its values and scales.
    shape = (-1, layout.layers, 1, 1, 1, layout.layer_bytes // 4)
    part = pool.view(torch.int32).view(shape)[:, layers.start : layers.end]
    staged = part.new_empty(blocks.numel(), *part.shape[1:])
    gather_blocks(part, blocks.to(torch.int32), staged)
    return staged.view(blocks.numel(), -1).view(torch.uint8)
