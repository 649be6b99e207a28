"""How kernels address one layer of the block-major KV pool, and how new KV gets in.

The pool is [num_blocks, layers, parts, kv_heads, block_size, head_dim]. Seen from the first element
of a layer on, it is a list of runs of block_size × head_dim values, one run per (block, layer,
part, head), and each run is block_size slots of head_dim values:

    run  (block, part, head)         = (block × layers × parts + part) × kv_heads + head
    slot (block, part, head, offset) = run × block_size + offset

The same numbers hold for every layer, so that one index serves them all. There are two parts, K
and V, or one that is both (multi-head latent attention).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer of a pool; both are views that share its memory."""

    runs: Tensor
    """[runs, block_size * head_dim], for reading whole blocks."""
    slots: Tensor
    """[slots, head_dim], for writing single tokens."""
    parts: int


def layer_views(pool: Tensor) -> tuple[KVLayer, ...]:
    """Return every layer of a pool [num_blocks, layers, parts, kv_heads, block, head_dim]."""
    assert pool.is_contiguous()
    _, layers, parts, kv_heads, block_size, head_dim = pool.shape
    per_layer = parts * kv_heads
    runs = pool.view(-1, block_size * head_dim)
    slots = pool.view(-1, head_dim)
    return tuple(
        KVLayer(runs[layer * per_layer :], slots[layer * per_layer * block_size :], parts)
        for layer in range(layers)
    )


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """One layer of a pool as kernels on a device see it."""

    values: Tensor
    """[num_blocks, parts, kv_heads, block_size, head_dim]; a block's tokens lie together for each
    head, other strides are free."""
    scales: Tensor | None = None
    """[num_blocks, parts, kv_heads] float32, where values stand for themselves times these."""


def paged_layers(pool: Tensor, scales: Tensor | None = None) -> tuple[PagedLayer, ...]:
    """Return every layer of a pool [num_blocks, layers, parts, kv_heads, block, head_dim].

    A pool in float8 has `scales` [num_blocks, layers, parts, kv_heads] (float32) that say what its
    values stand for; new KV is divided by them, so they must be set before it is written. Where a
    layout keeps them behind the values (core/kv_layout.py), kv_convert.py has the views of both.
    """
    return tuple(
        PagedLayer(pool[:, layer], None if scales is None else scales[:, layer])
        for layer in range(pool.shape[1])
    )


def write_kv(layer: KVLayer, slots: Tensor, kv: Tensor) -> None:
    """Write kv [tokens, parts, kv_heads, head_dim] to slots [tokens × parts × kv_heads].

    Values are rounded to the pool's dtype.
    """
    values = kv.reshape(slots.shape[0], -1)
    layer.slots.index_copy_(0, slots, values.to(layer.slots.dtype))


def run_index(blocks: Tensor, layers: int, per_layer: int) -> Tensor:
    """Return the runs [n, per_layer, m] of block tables [n, m] (int64).

    `per_layer` is the number of runs that a layer of a block has: parts × kv_heads.
    """
    within = torch.arange(per_layer, device=blocks.device)[None, :, None]
    return blocks[:, None, :] * (layers * per_layer) + within


def slot_index(
    blocks: Tensor, offsets: Tensor, *, layers: int, per_layer: int, block_size: int
) -> Tensor:
    """Return the slots [tokens × per_layer] of tokens in blocks [tokens] at offsets [tokens]."""
    runs = run_index(blocks[:, None], layers, per_layer)
    return (runs * block_size + offsets[:, None, None]).flatten()
