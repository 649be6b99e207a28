"""Grouped-query attention over the paged pool, with what the families add to it."""

import torch
from torch import Tensor

from baton.kernels.attention import attend
from baton.kernels.attention_scores import Scoring
from baton.kernels.kv_pool import KVLayer, write_kv
from baton.kernels.linear import Linear
from baton.kernels.rope import rope_
from baton.models.blocks.norms import HeadNorm, norm_weight
from baton.models.blocks.step import Step
from baton.models.decoder_spec import AttentionSpec, DecoderSpec
from baton.models.weights import Checkpoint


class Attention:
    """q, k and v by one matrix, perhaps normed, turned, written and attended to."""

    def __init__(
        self,
        spec: AttentionSpec,
        decoder: DecoderSpec,
        checkpoint: Checkpoint,
        prefix: str,
        hidden: int,
    ) -> None:
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = [(f"{prefix}q_proj", q), (f"{prefix}k_proj", kv), (f"{prefix}v_proj", kv)]
        fused = checkpoint.take_fused(f"{prefix}qkv_proj", parts, width=hidden, bias=spec.bias)
        self._qkv = Linear(*fused)
        out = [(f"{prefix}o_proj", hidden)]
        self._out = Linear(*checkpoint.take_fused("", out, width=q, bias=spec.out_bias))
        sinks = checkpoint.take(f"{prefix}sinks", spec.heads) if spec.sinks else None
        self._scoring = Scoring(spec.scale, spec.softcap, sinks)
        self._head_norm = _head_norm(spec, decoder, checkpoint, prefix) if spec.qk_norm else None
        self._spec = spec
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
        batch = step.batch[spec.window]
        write_kv(kv, batch.slots, heads[:, spec.heads :])
        return attend(heads[:, : spec.heads], kv, batch, self._scoring, step.workspace)

    def mix(self, heads_out: Tensor) -> Tensor:
        """Return [tokens, hidden] of the heads' outputs."""
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
