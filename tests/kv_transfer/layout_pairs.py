"""Pools whose every byte says which byte of the model's KV it is, for pairs of layouts."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from baton.core.kv_layout import SCALE_BYTES, KVLayout, LayerRange
from baton.core.sharded_layout import Shard, ShardedLayout
from baton.kv_transfer.plan import TokenRange

Pool = NDArray[np.int64]
"""One number per byte."""
NOTHING = -1
MAX_TOKENS = 80


def fill(
    shard: Shard,
    num_blocks: int,
    table: list[int],
    tokens: TokenRange,
    layers: LayerRange,
    scale_size: int,
    base: int = 0,
) -> Pool:
    """Return a pool that holds `tokens` of `layers`, its bytes numbered as in the whole model.

    The block table begins with the block of token `base`. A scale is that of the `scale_size`
    tokens around the one that it lies behind.
    """
    layout = shard.layout
    size, width = layout.block_size, layout.token_bytes
    shape = (num_blocks, layout.layers, layout.parts, layout.kv_heads, layout.head_bytes)
    pool = np.full(shape, NOTHING, np.int64)
    layer, part, head = np.indices(shape[1:4])
    which = ((layer + shard.layers.start) * layout.parts + part) * 64 + head + shard.heads.start
    held = slice(
        max(layers.start, shard.layers.start) - shard.layers.start,
        max(0, min(layers.end, shard.layers.end) - shard.layers.start),
    )
    for token in range(tokens.start, tokens.end):
        block = pool[table[token // size - base // size]]
        slot = token % size
        numbers = (which[..., None] * MAX_TOKENS * 4 + token) * width + np.arange(width)
        block[held, :, :, slot * width : (slot + 1) * width] = numbers[held]
        if layout.scaled:
            scales = (which[..., None] * MAX_TOKENS + token // scale_size) * SCALE_BYTES
            block[held, :, :, layout.value_bytes :] = -2 - (scales + np.arange(SCALE_BYTES))[held]
    return pool.reshape(-1)


DTYPES = ("float32", "bfloat16", "float8_e4m3fn")


@st.composite
def pairs(draw: st.DrawFn) -> tuple[ShardedLayout, ShardedLayout]:
    """Draw two layouts of one model that KV can travel between."""
    heads = draw(st.sampled_from([1, 2, 6, 8]))
    parts = draw(st.sampled_from([1, 2]))
    layers = draw(st.integers(1, 5))
    tps = [tp for tp in (1, 2, 3, 4, 8) if heads % tp == 0 or tp % heads == 0]
    model = KVLayout(layers, heads, 8, 2, "float32", parts)

    def side() -> ShardedLayout:
        borders = draw(st.sets(st.integers(1, layers - 1))) if layers > 1 else set()
        size, dtype = draw(st.sampled_from([8, 16, 32])), draw(st.sampled_from(DTYPES))
        held = replace(model, block_size=size, dtype=dtype)
        return ShardedLayout(held, draw(st.sampled_from(tps)), tuple(sorted(borders)))

    return side(), side()
