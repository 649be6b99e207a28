"""Latent attention of prompts' chunks, with the keys and values of each head made of the latents.

For many queries that costs less than carrying each of them into the latent space: a score is over
nope_dim + rope_dim dimensions instead of kv_rank + rope_dim. Keys of a chunk's whole sequence are
made, for some of the heads at a time.
"""

import torch
from torch import Tensor
from torch.nn import functional

from baton.kernels.kv_pool import PagedLayer
from baton.kernels.paged_batch import PagedBatch
from baton.kernels.paged_reference import sequence_kv
from baton.models.blocks.step import LatentHeads

_VALUES = 1 << 28  # of keys that may be in memory at a time; as many again of values


def attend_prompts(
    q: Tensor, kv: PagedLayer, batch: PagedBatch, how: LatentHeads, out: Tensor
) -> None:
    """Write the heads' outputs [tokens, heads, value_dim] of the chunks' rows.

    q is [tokens, heads, nope_dim + rope_dim], turned. The chunks' latents must be in the pool.
    """
    assert batch.starts is not None
    assert len(batch.chunks) == batch.starts.shape[0] - 1, "PagedBatch.chunks is wanted here"
    row = 0
    for chunk, (rows, length) in enumerate(batch.chunks):
        if not rows:
            continue
        table = batch.tables[batch.decodes + chunk]
        latents = sequence_kv(kv, table, length)[0, 0].to(q.dtype)
        _attend(q[row : row + rows], latents, how, out[row : row + rows])
        row += rows
    out[row:] = 0


def _attend(q: Tensor, latents: Tensor, how: LatentHeads, out: Tensor) -> None:
    # Importing it brings torch's compiler along, which takes seconds and leaves files behind.
    from torch.nn.attention.bias import causal_lower_right

    spec = how.spec
    length, rows = latents.shape[0], q.shape[0]
    plain, turned = latents[:, : spec.kv_rank], latents[:, spec.kv_rank :]
    width = spec.nope_dim + spec.rope_dim
    step = max(1, _VALUES // (length * width))
    for head in range(0, spec.heads, step):
        some = slice(head, min(head + step, spec.heads))
        keys = torch.cat(
            [
                torch.matmul(plain, how.key[some].transpose(1, 2)),
                turned.expand(some.stop - some.start, -1, -1),
            ],
            dim=-1,
        )
        # Values as wide as keys are what torch's fastest attention takes.
        values = torch.matmul(plain, how.value[some])
        values = functional.pad(values, (0, width - spec.value_dim))
        seen = functional.scaled_dot_product_attention(
            q[:, some].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=causal_lower_right(rows, length),
            scale=how.scoring.scale,
        )
        out[:, some] = seen[0, ..., : spec.value_dim].transpose(0, 1)
