"""Brings a range of layers of scattered blocks of a pool together, so that one copy moves them."""

import torch
from torch import Tensor

from baton.core.ids import BlockId
from baton.core.kv_layout import KVLayout, LayerRange


def gather_kv(pool: Tensor, layout: KVLayout, blocks: Tensor, layers: LayerRange) -> Tensor:
    """Return the bytes of `layers` of blocks [n] (int64), [n, len(layers) × layer_bytes] (uint8).

    `pool` [num_blocks × block_bytes] is bytes (uint8) on the same device as `blocks`.
    """
    start, size = layout.run(BlockId(0), layers)
    return torch.index_select(pool.view(-1, layout.block_bytes)[:, start : start + size], 0, blocks)
