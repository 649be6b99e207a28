"""Grouped-query attention over the paged pool, with what the families add to it."""

from dataclasses import replace

import torch
from torch import Tensor

from baton.core.sharded_layout import held_heads
from baton.kernels.attention_scores import Scoring
from baton.models.blocks.linears import column_parallel, row_parallel
from baton.models.blocks.norms import HeadNorm, norm_weight
from baton.models.blocks.step import KV, GroupedHeads, StepUnderWay
from baton.models.decoder_spec import AttentionSpec, DecoderSpec
from baton.models.weights import Checkpoint, Rows
from baton.parallel.group import Group
from baton.parallel.split import even


class Attention:
    """q, k and v by one matrix, perhaps normed, turned, written and attended to.

    A rank computes some of the query heads, and the KV heads that these need: where there are fewer
    KV heads than ranks, neighbours compute and hold the same one.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        decoder: DecoderSpec,
        checkpoint: Checkpoint,
        prefix: str,
        hidden: int,
        tp: Group,
    ) -> None:
        dims, heads = spec.head_dim, even(spec.heads, tp.rank, tp.size)
        kv = held_heads(spec.kv_heads, tp.size, tp.rank)
        q_rows = slice(heads.start * dims, heads.stop * dims)
        kv_rows = slice(kv.start * dims, kv.end * dims)
        parts = [
            Rows(f"{prefix}q_proj", spec.heads * dims, q_rows),
            Rows(f"{prefix}k_proj", spec.kv_heads * dims, kv_rows),
            Rows(f"{prefix}v_proj", spec.kv_heads * dims, kv_rows),
        ]
        whole = f"{prefix}qkv_proj"
        self._qkv = column_parallel(checkpoint, whole, parts, width=hidden, bias=spec.bias)
        out = (hidden, spec.heads * dims)
        self._out = row_parallel(checkpoint, f"{prefix}o_proj", out, tp, bias=spec.out_bias)
        sinks = None
        if spec.sinks:
            sinks = checkpoint.take(f"{prefix}sinks", spec.heads, cut=(heads,))
        own = replace(spec, heads=spec.heads // tp.size, kv_heads=len(kv))
        norm = _head_norm(own, decoder, checkpoint, prefix) if spec.qk_norm else None
        self._how = GroupedHeads(own, Scoring(spec.scale, spec.softcap, sinks), norm)

    @property
    def projected(self) -> tuple[tuple[int, ...], ...]:
        """The shape of a token's row of each tensor that `project` returns."""
        spec = self._how.spec
        return ((spec.heads + 2 * spec.kv_heads, spec.head_dim),)

    @property
    def seen(self) -> int:
        """The width of a token's row of what `attend` returns."""
        return self._how.spec.heads * self._how.spec.head_dim

    def project(self, normed: Tensor) -> tuple[Tensor, ...]:
        """Return q, k and v [tokens, heads + 2 kv_heads, head_dim] of what is normed."""
        return (self._qkv(normed).view(normed.shape[0], *self.projected[0]),)

    def attend(self, projected: tuple[Tensor, ...], kv: KV, step: StepUnderWay[KV]) -> Tensor:
        """Write the new KV to the pool; return the heads' outputs [tokens, heads × head_dim]."""
        (heads,) = projected
        return step.attend(heads, kv, self._how)

    def mix(self, heads_out: Tensor) -> Tensor:
        """Return this rank's part of the sum [tokens, hidden] of all heads' outputs."""
        return self._out(heads_out)


def _head_norm(
    spec: AttentionSpec, decoder: DecoderSpec, checkpoint: Checkpoint, prefix: str
) -> HeadNorm:
    q, k = (
        norm_weight(checkpoint, f"{prefix}{name}_norm", spec.head_dim, decoder)
        for name in ("q", "k")
    )
    rows = torch.cat([q.expand(spec.heads, -1), k.expand(spec.kv_heads, -1)])
    return HeadNorm(rows, decoder.norm_eps)
