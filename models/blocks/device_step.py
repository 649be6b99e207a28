"""A step on a device: inputs in static buffers, and nothing that depends on their values.

    tokens      | d  d  d  d  p  p | c  c  c  c  c | c  c  c | p  p |
    sequences   | 0  1  2  3  4  5 |       6       |    7    | (8: empty)
                  decodes            chunks of prompts

The first `decodes` rows are sequences of one new token each; the others are chunks of prompts,
whose borders are in `starts`. Whatever the buffers hold, the launches are the same: a step that
was captured in a CUDA graph is replayed for other sequences by writing other numbers into its
buffers. What a graph is captured for is the buffers' shapes and `decodes`.

Rows and sequences that are padding (p) have

    token 0, position 0, slot -1                  its KV is written nowhere: no scratch block
    length 0, tables of any valid block           attention gives 0
    starts[i + 1] = starts[i]                     for sequences among the chunks

and logits that nobody should read. The pool may hold anything, NaN included, where no token is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.kv_pool import PagedLayer
from baton.kernels.latent_write import latent_write_
from baton.kernels.paged_attention import PagedAttention
from baton.kernels.paged_batch import PagedBatch
from baton.kernels.rope import RopeTables
from baton.kernels.rope_kv_write import rope_kv_write_
from baton.models.blocks.latent_prompt import attend_prompts
from baton.models.blocks.step import GroupedHeads, LatentHeads
from baton.models.rope_spec import RopeSpec
from baton.parallel.token_rows import TokenRows


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """One step's input; all tensors are on the model's device."""

    tokens: Tensor
    """[tokens] int64"""
    positions: Tensor
    """[tokens] int64: each token's place in its sequence."""
    slots: Tensor
    """[tokens] int64: block * block_size + offset of where the token's KV goes; -1 for padding."""
    batch: PagedBatch
    """The sequences: their blocks and lengths, and which tokens are whose."""
    sampled: Tensor | None = None
    """[rows] int64: which tokens' logits are wanted, any token for padding; None for all."""

    def __post_init__(self) -> None:
        tokens, decodes = self.tokens.shape[0], self.batch.decodes
        assert self.positions.shape == self.slots.shape == self.tokens.shape
        assert (self.batch.starts is None) == (decodes == tokens), f"{decodes} of {tokens} tokens"


@dataclass(frozen=True, slots=True)
class DeviceRun:
    """A step under way on a device; see StepUnderWay."""

    slots: Tensor
    angles: Mapping[RopeSpec, RopeTables]
    attention: PagedAttention
    rows: TokenRows

    def attend(self, heads: Tensor, kv: PagedLayer, how: GroupedHeads) -> Tensor:
        """See StepUnderWay."""
        spec, norm = how.spec, how.norm
        rope_kv_write_(
            heads,
            kv,
            self.slots,
            self.angles[spec.rope],
            norm_weights=None if norm is None else norm.weights,
            eps=0.0 if norm is None else norm.eps,
        )
        q = heads[:, : spec.heads]
        return self.attention.attend(q, kv, how.scoring, spec.window).flatten(1)

    def attend_latent(self, latent: Tensor, q: Tensor, kv: PagedLayer, how: LatentHeads) -> Tensor:
        """See StepUnderWay.

        Decodes carry their queries into the latent space, as models/blocks/latent_attention.py
        says; chunks make keys and values of the latents, which is less arithmetic for many rows.
        """
        spec, batch = how.spec, self.attention.batch
        norm, angles = how.norm, self.angles[spec.rope]
        latent_write_(latent, q, kv, self.slots, angles, norm.weight, norm.eps)
        out = q.new_empty(q.shape[0], spec.heads, spec.value_dim)
        if batch.decodes:
            rows = q[: batch.decodes]
            carried = q.new_empty(batch.decodes, spec.heads, latent.shape[1])
            plain = torch.matmul(rows[..., : spec.nope_dim].transpose(0, 1), how.key)
            carried[..., : spec.kv_rank] = plain.transpose(0, 1)
            carried[..., spec.kv_rank :] = rows[..., spec.nope_dim :]
            seen = self.attention.attend_latent(carried, kv, how.scoring, spec.kv_rank)
            values = torch.matmul(seen.transpose(0, 1), how.value)
            out[: batch.decodes] = values.transpose(0, 1)
        if batch.starts is not None:
            attend_prompts(q[batch.decodes :], kv, batch, how, out[batch.decodes :])
        return out.flatten(1)
