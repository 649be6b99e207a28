"""Turns KV that was read into staging, as its source held it, into KV of the target's blocks.

Staged units may be float32, bfloat16 or float16, or float8_e4m3fn with a float32 scale per (unit,
layer, part, head) behind its values, as core/kv_layout.py draws it; and so may the target. A value
in float8 stands for itself times its scale. The scale that is made here is the largest magnitude
of the head in its block over the largest finite float8, as in "FP8 Formats for Deep Learning"
(Micikevicius et al., 2022), section 4: nothing overflows, and all of the range is used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.core.kv_layout import KVLayout

_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
_TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


def value_view(memory: Tensor, layout: KVLayout) -> Tensor:
    """Return the values in `memory` [n × block_bytes] (uint8) as a view.

    Its shape is [n, layers, parts, kv_heads, block_size, head_dim], its dtype the layout's.
    """
    values = _heads(memory, layout)[..., : layout.value_bytes]
    return values.view(_TORCH_DTYPES[layout.dtype]).view(layout.shape(values.shape[0]))


def scale_view(memory: Tensor, layout: KVLayout) -> Tensor:
    """Return the scales in `memory`, as a view [n, layers, parts, kv_heads] (float32).

    For layouts with scales.
    """
    assert layout.scaled, f"{layout.dtype} has no scales"
    scales = _heads(memory, layout)[..., layout.value_bytes : layout.value_bytes + 4]
    return scales.view(torch.float32).squeeze(-1)


def convert_kv(
    staged: Tensor,
    staging: KVLayout,
    pool: Tensor,
    target: KVLayout,
    blocks: Sequence[int],
    *,
    tokens: int,
    first_layer: int,
    first_slot: int,
) -> None:
    """Write staged tokens into blocks of a pool, one after the other from a slot of the first.

    `staged` [units × staging.block_bytes] and `pool` are bytes (uint8) on one device; the other
    arguments are the fields of a kv_transfer.plan.Conversion. Staged slots after `tokens` hold
    nothing and are left out. The pool's layers from `first_layer` on, as many as staging has, are
    written; other layers, other blocks and, if the target has no scales, slots before and after
    the tokens keep what they hold. If it has, slots after them become zero, and `first_slot` is 0.
    """
    values = value_view(staged, staging).to(torch.float32)
    if staging.scaled:
        values = values * scale_view(staged, staging)[..., None, None]
    # [tokens, layers, parts, kv_heads, head_dim]
    by_token = values.movedim(4, 1).flatten(0, 1)[:tokens]
    layers = slice(first_layer, first_layer + staging.layers)
    held = value_view(pool, target)[:, layers]
    index = torch.as_tensor(blocks, dtype=torch.int64, device=pool.device)
    if target.scaled:
        assert first_slot == 0, "a scale is of a whole block"
        whole = _whole_blocks(by_token, index.numel(), target.block_size)
        scales = _scales_of(whole)
        held[index] = (whole / scales[..., None, None]).to(held.dtype)
        scale_view(pool, target)[:, layers][index] = scales
        return
    slots = torch.arange(tokens, device=pool.device) + first_slot
    at = index[slots // target.block_size], slots % target.block_size
    held.movedim(4, 1)[at] = by_token.to(held.dtype)


def _heads(memory: Tensor, layout: KVLayout) -> Tensor:
    shape = (-1, layout.layers, layout.parts, layout.kv_heads, layout.head_bytes)
    return memory.view(shape)


def _whole_blocks(by_token: Tensor, blocks: int, block_size: int) -> Tensor:
    """Return tokens [n, layers, parts, heads, dims] as blocks, in a pool's order, zeros at the end.

    Zeros, and not what old tokens left there: they must not widen the scale.
    """
    missing = blocks * block_size - by_token.shape[0]
    assert 0 <= missing < block_size, f"{by_token.shape[0]} tokens for {blocks} blocks"
    padded = torch.cat([by_token, by_token.new_zeros(missing, *by_token.shape[1:])])
    return padded.view(blocks, block_size, *by_token.shape[1:]).movedim(1, 4)


def _scales_of(blocks: Tensor) -> Tensor:
    """Return the scale of each head of each block [blocks, layers, parts, heads]; never 0."""
    largest = blocks.abs().amax(dim=(4, 5))
    return torch.where(largest > 0, largest / _FLOAT8_MAX, torch.ones_like(largest))
