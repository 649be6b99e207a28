"""Norms q and k, turns them, and writes k and v to the paged pool."""

import torch
from torch import Tensor

from baton.kernels.backend import triton_serves
from baton.kernels.kv_pool import PagedLayer
from baton.kernels.rms_norm import rms_norm
from baton.kernels.rope import RopeTables, rope_by_tables_


def rope_kv_write_(
    qkv: Tensor,
    layer: PagedLayer,
    slots: Tensor,
    angles: RopeTables,
    *,
    norm_weights: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Norm and turn q in place, and write k, normed and turned, and v to a layer of the pool.

    `qkv` is [tokens, heads + 2 kv_heads, head_dim], q before k before v; `slots` [tokens] int64 is
    block × block_size + offset of each token, -1 for rows that are padding. With `norm_weights`
    [heads + kv_heads, head_dim], each head of q and k is first divided by its root mean square.
    What k and v of qkv hold afterwards is not said.
    """
    if triton_serves(qkv):
        from baton.kernels.triton import rope_kv_write

        rope_kv_write.rope_kv_write_(
            qkv,
            layer.values,
            slots,
            angles.cos,
            angles.sin,
            norm_weights=norm_weights,
            eps=eps,
            kv_scales=layer.scales,
        )
        return
    kv_heads = layer.values.shape[2]
    q_and_k = qkv[:, : qkv.shape[1] - kv_heads]
    if norm_weights is not None:
        ones = norm_weights.new_ones(qkv.shape[-1])
        q_and_k.copy_(rms_norm(q_and_k, ones, eps).mul_(norm_weights))
    rope_by_tables_(q_and_k, angles)
    new = qkv[:, qkv.shape[1] - 2 * kv_heads :]
    write_paged(layer, slots, new.view(qkv.shape[0], 2, kv_heads, -1))


def write_paged(layer: PagedLayer, slots: Tensor, new: Tensor) -> None:
    """Write `new` [tokens, parts, kv_heads, head_dim] to slots [tokens], but not to slot -1."""
    kept = slots >= 0
    blocks, offsets = slots[kept] // layer.values.shape[3], slots[kept] % layer.values.shape[3]
    found = new[kept]
    if layer.scales is not None:
        most = torch.finfo(layer.values.dtype).max
        found = (found.float() / layer.scales[blocks][..., None]).clamp_(-most, most)
    layer.values[blocks, :, :, offsets] = found.to(layer.values.dtype)
