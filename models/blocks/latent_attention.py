"""Multi-head latent attention (DeepSeek-V2, 2024) with absorbed projections.

A token's KV is one vector, its normed latent and a turned part that all heads share:

    pool[token] = [ latent (kv_rank) | turned (rope_dim) ]

A head's key is (K_h · latent | turned) and its value V_h · latent. Neither is ever computed:
since q · (K_h · latent) = (K_hᵀ · q) · latent, each head's query is carried into the latent space
instead, all heads attend to the pool's vectors as they are, as to one KV head, and what they
bring back goes through V_h once.
"""

from dataclasses import replace

import torch
from torch import Tensor

from baton.kernels.attention_scores import Scoring
from baton.kernels.kv_pool import KVLayer
from baton.kernels.linear import Linear
from baton.kernels.rope import rope_
from baton.models.blocks.linears import row_parallel
from baton.models.blocks.norms import Norm
from baton.models.blocks.step import Step
from baton.models.decoder_spec import LatentAttentionSpec
from baton.models.weights import Checkpoint, Rows
from baton.parallel.group import Group
from baton.parallel.split import even

# The norms within have an epsilon of their own, whatever the config says of the others.
NORM_EPS = 1e-6


class LatentAttention:
    """Queries (perhaps squeezed), the latent, and the two absorbed matrices of each head.

    A rank computes some of the heads; the latent, which serves all, every rank computes and holds.
    """

    def __init__(
        self,
        spec: LatentAttentionSpec,
        checkpoint: Checkpoint,
        prefix: str,
        hidden: int,
        tp: Group,
    ) -> None:
        heads = even(spec.heads, tp.rank, tp.size)
        self._scoring = Scoring(spec.scale)
        self._squeeze: tuple[Linear, Norm] | None = None
        name, width = f"{prefix}q_proj", hidden
        if spec.query_rank is not None:
            down = _matrix(checkpoint, f"{prefix}q_a_proj", (spec.query_rank, hidden), spec.bias)
            norm = checkpoint.take(f"{prefix}q_a_layernorm.weight", spec.query_rank)
            self._squeeze = Linear(*down), Norm(norm, NORM_EPS)
            name, width = f"{prefix}q_b_proj", spec.query_rank
        q = _by_head(checkpoint, name, (spec.heads, spec.nope_dim + spec.rope_dim, width), heads)
        self._q = Linear(_halves(q, spec.rope_dim, spec.interleaved).flatten(0, 1))
        latent = spec.kv_rank + spec.rope_dim
        kv, bias = _matrix(checkpoint, f"{prefix}kv_a_proj_with_mqa", (latent, hidden), spec.bias)
        if bias is not None:
            bias = _halves(bias[:, None], spec.rope_dim, spec.interleaved)[:, 0]
        self._kv = Linear(_halves(kv, spec.rope_dim, spec.interleaved), bias)
        norm = checkpoint.take(f"{prefix}kv_a_layernorm.weight", spec.kv_rank)
        self._kv_norm = Norm(norm, NORM_EPS)
        shape = (spec.heads, spec.nope_dim + spec.value_dim, spec.kv_rank)
        both = _by_head(checkpoint, f"{prefix}kv_b_proj", shape, heads)
        self._key = both[:, : spec.nope_dim]
        """[heads, nope_dim, kv_rank]"""
        self._value = both[:, spec.nope_dim :].transpose(1, 2)
        """[heads, kv_rank, value_dim]"""
        out = (hidden, spec.heads * spec.value_dim)
        self._out = row_parallel(checkpoint, f"{prefix}o_proj", out, tp, bias=spec.bias)
        self._spec = replace(spec, heads=spec.heads // tp.size)
        """Of this rank's heads."""

    def heads_out(self, normed: Tensor, kv: KVLayer, step: Step) -> Tensor:
        """Write the new KV to the pool; return the heads' outputs [tokens, heads × value_dim]."""
        spec, angles = self._spec, step.angles[self._spec.rope]
        tokens = normed.shape[0]
        latent = self._kv(normed)
        latent[:, : spec.kv_rank] = self._kv_norm(latent[:, : spec.kv_rank])
        rope_(latent[:, None, spec.kv_rank :], angles)
        q = self._queries(normed).view(tokens, spec.heads, -1)
        rope_(q[..., spec.nope_dim :], angles)
        carried = q.new_empty(tokens, spec.heads, latent.shape[1])
        plain = torch.matmul(q[..., : spec.nope_dim].transpose(0, 1), self._key)
        carried[..., : spec.kv_rank] = plain.transpose(0, 1)
        carried[..., spec.kv_rank :] = q[..., spec.nope_dim :]
        seen = step.attend(carried, latent[:, None], kv, None, self._scoring).view(carried.shape)
        values = torch.matmul(seen[..., : spec.kv_rank].transpose(0, 1), self._value)
        return values.transpose(0, 1).reshape(tokens, -1)

    def _queries(self, normed: Tensor) -> Tensor:
        if self._squeeze is not None:
            down, norm = self._squeeze
            normed = norm(down(normed))
        return self._q(normed)

    def mix(self, heads_out: Tensor) -> Tensor:
        """Return this rank's part of the sum [tokens, hidden] of all heads' outputs."""
        return self._out(heads_out)


def _matrix(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], bias: bool
) -> tuple[Tensor, Tensor | None]:
    rows, width = shape
    return checkpoint.take_fused("", [Rows(name, rows)], width=width, bias=bias)


def _by_head(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int, int], heads: slice
) -> Tensor:
    """Return the rows [heads, rows, width] of some of a matrix's heads."""
    count, rows, width = shape
    cut = (slice(heads.start * rows, heads.stop * rows),)
    return checkpoint.take(f"{name}.weight", count * rows, width, cut=cut).view(-1, rows, width)


def _halves(matrix: Tensor, turned: int, interleaved: bool) -> Tensor:
    """Reorder the last `turned` of the rows [.., rows, width] from pair by pair to half by half."""
    if not interleaved:
        return matrix
    first = matrix.shape[-2] - turned
    order = [*range(first), *range(first, first + turned, 2), *range(first + 1, first + turned, 2)]
    return matrix[..., order, :]
