"""What paged attention computes, in torch: sequence by sequence, with lengths read on the host."""

import torch
from torch import Tensor

from baton.kernels.attention_mask import band_mask
from baton.kernels.attention_scores import Scoring, weigh
from baton.kernels.kv_pool import PagedLayer
from baton.kernels.paged_batch import PagedBatch


def attend(
    q: Tensor, layer: PagedLayer, batch: PagedBatch, scoring: Scoring, window: int | None
) -> Tensor:
    """See PagedAttention.attend."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts = list(range(batch.decodes + 1))
    if batch.starts is not None:
        starts[-1:] = (batch.starts + batch.decodes).tolist()
    for sequence, length in enumerate(batch.lengths.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        count = rows.stop - rows.start
        if not length or not count:
            continue
        kv = sequence_kv(layer, batch.tables[sequence], length).to(q.dtype)
        mask = band_mask(count, length, window, dtype=q.dtype, device=q.device)
        queries = q[rows].transpose(0, 1)[None]
        seen = weigh(queries, kv[:1], kv[-1:], mask, scoring)
        out[rows] = seen[0].transpose(0, 1)
    return out


def sequence_kv(layer: PagedLayer, table: Tensor, length: int) -> Tensor:
    """Return a sequence's KV [parts, kv_heads, length, head_dim], scaled if the pool is."""
    blocks = table[: -(-length // layer.values.shape[3])]
    found = layer.values[blocks]
    if layer.scales is not None:
        found = found.float() * layer.scales[blocks][..., None, None]
    return found.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
