"""Attention of a ragged batch over the paged KV pool.

The rows of a batch are in groups, decodes first:

    [ d d d d | d d d | p p p p p p p p | p p p p p ]
      decodes   decodes  chunk             chunk
      of like length     of one prompt     of another

A group of decodes is padded to its longest sequence and runs as one call; a chunk runs alone, and
a tile of its rows at a time where it needs a mask, so that masks take memory in proportion to the
sequence's length. Either reads its blocks by whole runs, so the gathered K and V are
[.., kv_heads, length, head_dim] as torch's attention wants them. With a sliding window, blocks
that no row can see are not read. Where several query heads share a KV head, K and V are not
repeated: a decode's query heads stand where the rows of a longer query would. A pool of one part
gives the same vectors as K and as V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.attention_mask import band_mask
from baton.kernels.attention_scores import Scoring, weigh
from baton.kernels.kv_pool import KVLayer

TILE_ROWS = 256
"""Rows of a chunk that share a mask, and one call."""
# Scores that may be in memory at a time where they are not computed by torch's own attention.
_SCORES = 1 << 24

_KV = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of one new token each."""

    start: int
    end: int
    """Rows of the batch, one per sequence."""
    runs: Tensor
    """[sequences * runs per layer * blocks]; shorter tables are padded with their last block."""
    mask: Tensor
    """[sequences, 1, 1, blocks * block_size]: 0 where a token is seen, -inf elsewhere."""


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Several new tokens of one sequence."""

    start: int
    end: int
    """Rows of the batch."""
    runs: Tensor
    """[runs per layer * blocks]"""
    first: int
    """Place in the sequence of the first token that `runs` holds; 0 without a window."""
    length: int
    """Tokens of the sequence up to the chunk's end."""
    window: int | None
    """Tokens that a row sees at most, its own included."""
    mask: Tensor | None
    """[tile rows, keys], a band_mask for every tile; None where length = rows and all is seen."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Everything attention needs to know of a step; the same for all layers of one window."""

    slots: Tensor
    """[tokens * runs per layer]: where the new KV goes."""
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[PromptChunk, ...]


class Workspace:
    """Memory for gathered KV, kept from step to step because fresh pages are slow.

    It grows to the largest group seen, at most one layer of the pool for a group, and stays.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, like: Tensor, rows: int) -> Tensor:
        """Return [rows, like.shape[1]] of `like`'s dtype and device; it is valid until next taken.

        The contents are whatever was there.
        """
        count = rows * like.shape[1]
        if self._buffer is None or self._buffer.numel() < count:
            self._buffer = like.new_empty(count)
        return self._buffer[:count].view(rows, like.shape[1])


def attend(
    q: Tensor, layer: KVLayer, batch: AttentionBatch, scoring: Scoring, workspace: Workspace
) -> Tensor:
    """Return the attention output [tokens, heads × head_dim] for q [tokens, heads, head_dim].

    The new tokens' KV must be in the pool already.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for group in batch.decodes:
        rows = slice(group.start, group.end)
        shape = (group.end - group.start, group.mask.shape[-1], q.shape[-1])
        kv = _keys_values(layer, group.runs, workspace, shape, q.dtype)
        _decode(q[rows], kv, group.mask, scoring, out[rows])
    for chunk in batch.chunks:
        rows = slice(chunk.start, chunk.end)
        block_size = layer.runs.shape[1] // q.shape[-1]
        blocks = -(-(chunk.length - chunk.first) // block_size)
        shape = (1, blocks * block_size, q.shape[-1])
        kv = _keys_values(layer, chunk.runs, workspace, shape, q.dtype)
        _chunk(q[rows], kv, chunk, scoring, out[rows])
    return out.view(q.shape[0], -1)


def _keys_values(
    layer: KVLayer,
    runs: Tensor,
    workspace: Workspace,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> _KV:
    """Gather runs; return K and V [sequences, kv_heads, length, head_dim], length in whole blocks.

    They lie in the workspace, unless `dtype` is not the pool's; of a pool of one part they are the
    same tensor.
    """
    sequences, length, head_dim = shape
    gathered = workspace.take(layer.runs, runs.shape[0])
    torch.index_select(layer.runs, 0, runs, out=gathered)
    kv = gathered.view(sequences, layer.parts, -1, length, head_dim).to(dtype)
    return kv[:, 0], kv[:, -1]


def _decode(q: Tensor, kv: _KV, mask: Tensor, scoring: Scoring, out: Tensor) -> None:
    k, v = kv
    sequences, heads, head_dim = q.shape
    shape = (sequences, heads, 1, head_dim)
    if scoring.fused:
        shape = (sequences, k.shape[1], heads // k.shape[1], head_dim)
        mask = mask.expand(*shape[:3], -1)
    out.view(shape).copy_(weigh(q.view(shape), k, v, mask, scoring))


def _chunk(q: Tensor, kv: _KV, chunk: PromptChunk, scoring: Scoring, out: Tensor) -> None:
    k, v = kv
    rows, heads = q.shape[:2]
    queries = q.transpose(0, 1)[None]
    results = out.transpose(0, 1)[None]
    if chunk.mask is None and scoring.fused:
        keys = slice(0, chunk.length)
        results.copy_(weigh(queries, k[:, :, keys], v[:, :, keys], None, scoring, causal=True))
        return
    before = chunk.length - rows
    step = _tile_rows(heads, chunk, scoring)
    mask = chunk.mask
    if mask is None:
        mask = band_mask(min(step, rows), chunk.length, None, dtype=q.dtype, device=q.device)
    for row in range(0, rows, step):
        tile = slice(row, min(row + step, rows))
        end = before + tile.stop - chunk.first
        seen = 0 if chunk.window is None else before + row + 1 - chunk.window - chunk.first
        keys = slice(max(0, seen), end)
        corner = mask[mask.shape[0] - (tile.stop - row) :, mask.shape[1] - (end - keys.start) :]
        results[:, :, tile] = weigh(
            queries[:, :, tile], k[:, :, keys], v[:, :, keys], corner, scoring
        )


def _tile_rows(heads: int, chunk: PromptChunk, scoring: Scoring) -> int:
    if scoring.fused:
        return TILE_ROWS
    return max(1, min(TILE_ROWS, _SCORES // (heads * (chunk.length - chunk.first))))
