"""Grouped-query attention over the paged pool, with what the families add to it."""

from dataclasses import replace

import torch
from torch import Tensor

from baton.core.sharded_layout import held_heads
from baton.kernels.attention_scores import Scoring
from baton.kernels.kv_pool import KVLayer
from baton.kernels.rope import rope_
from baton.models.blocks.linears import column_parallel, row_parallel
from baton.models.blocks.norms import HeadNorm, norm_weight
from baton.models.blocks.step import Step
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
        self._scoring = Scoring(spec.scale, spec.softcap, sinks)
        self._spec = spec = replace(spec, heads=spec.heads // tp.size, kv_heads=len(kv))
        """Of this rank's heads."""
        self._head_norm = _head_norm(spec, decoder, checkpoint, prefix) if spec.qk_norm else None
        self._turned = 2 * len(spec.rope.frequencies)

    def heads_out(self, normed: Tensor, kv: KVLayer, step: Step) -> Tensor:
        """Write the new KV to the pool; return the heads' outputs [tokens, heads × head_dim]."""
        spec = self._spec
        heads = self._qkv(normed).view(
            normed.shape[0], spec.heads + 2 * spec.kv_heads, spec.head_dim
        )
        q_and_k = heads[:, : spec.heads + spec.kv_heads]
        if self._head_norm is not None:
            self._head_norm.normalise_(q_and_k)
        rope_(q_and_k[..., : self._turned], step.angles[spec.rope])
        q, new = heads[:, : spec.heads], heads[:, spec.heads :]
        return step.attend(q, new, kv, spec.window, self._scoring)

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
