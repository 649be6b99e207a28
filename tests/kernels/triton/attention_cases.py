"""Pools of random KV, and attention over them in float64 as its definition has it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.attention_scores import Scoring


@dataclass(frozen=True)
class Paged:
    """One layer of a pool, and the blocks of some sequences in it."""

    kv: Tensor
    """[num_blocks, parts, kv_heads, block_size, head_dim]: a view with the pool's strides."""
    tables: Tensor
    """[sequences, blocks] int32"""
    lengths: Tensor
    """[sequences] int32"""

    def tokens(self, sequence: int, scales: Tensor | None = None) -> Tensor:
        """Return a sequence's KV [parts, kv_heads, length, head_dim] in float64.

        `scales` are those of the pool [num_blocks, parts, kv_heads].
        """
        blocks = self.tables[sequence].long()
        runs = self.kv[blocks].double()
        if scales is not None:
            runs *= scales[blocks][..., None, None]
        return runs.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.lengths[sequence]]


def paged(
    lengths: list[int],
    kv_heads: int,
    head_dim: int,
    *,
    block_size: int = 16,
    parts: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Paged:
    """Return random KV of sequences in shuffled blocks; what no token fills is NaN."""
    random = torch.Generator().manual_seed(seed)
    most = -(-max(lengths) // block_size)
    count = len(lengths) * most + 3
    pool = torch.full((count, 2, parts, kv_heads, block_size, head_dim), float("nan"))
    order = torch.randperm(count, generator=random)
    tables = torch.full((len(lengths), most), count - 1, dtype=torch.int32)
    for row, length in enumerate(lengths):
        blocks = order[row * most : row * most + -(-length // block_size)]
        tables[row, : len(blocks)] = blocks
        for i, block in enumerate(blocks):
            filled = min(block_size, length - i * block_size)
            shape = (parts, kv_heads, filled, head_dim)
            pool[block, 1, :, :, :filled] = torch.randn(shape, generator=random)
    return Paged(pool.to(dtype)[:, 1], tables, torch.tensor(lengths, dtype=torch.int32))


def attention(
    q: Tensor,
    kv: Tensor,
    scoring: Scoring,
    *,
    window: int | None = None,
) -> Tensor:
    """Return attention [rows, heads, values] of the last rows of a sequence, in float64.

    q is [rows, heads, head_dim], kv [parts, kv_heads, length, head_dim]; row i of n stands at the
    place length - n + i.
    """
    rows, heads, _ = q.shape
    length, group = kv.shape[2], heads // kv.shape[1]
    k, v = kv[0].repeat_interleave(group, 0), kv[-1].repeat_interleave(group, 0)
    scores = torch.einsum("rhd,hnd->hrn", q.double(), k) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    place = torch.arange(length - rows, length)[:, None]
    key = torch.arange(length)[None]
    hidden = key > place
    if window is not None:
        hidden |= key <= place - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if scoring.sinks is not None:
        sinks = scoring.sinks.double()[:, None, None].expand(heads, rows, 1)
        scores = torch.cat([scores, sinks], -1)
    shares = scores.softmax(-1)[..., :length]
    return torch.einsum("hrn,hnd->rhd", shares, v)


def error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|; NaN where anything is NaN."""
    gap = found.double() - expected.double()
    return float(gap.norm() / expected.double().norm())
