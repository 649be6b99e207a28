"""Both kinds of attention as native operations: from the normed stream to the heads' outputs."""

import torch
from torch import Tensor

from baton.kernels.native.library import Kind
from baton.models.blocks.latent_attention import NORM_EPS
from baton.models.blocks.norms import norm_weight
from baton.models.decoder_spec import AttentionSpec, LatentAttentionSpec
from baton.models.native_ops import Operations

OUT = "heads_out"


def attention(
    ops: Operations, spec: AttentionSpec | LatentAttentionSpec, layer: int, prefix: str
) -> int:
    """Append what computes OUT from `normed`; return its width."""
    if isinstance(spec, AttentionSpec):
        return _grouped(ops, spec, layer, prefix)
    return _latent(ops, spec, layer, prefix)


def mix(
    ops: Operations,
    spec: AttentionSpec | LatentAttentionSpec,
    heads_out: str,
    prefix: str,
    norm: str,
) -> None:
    """Append the output projection, into the stream."""
    if isinstance(spec, AttentionSpec):
        width, bias = spec.heads * spec.head_dim, spec.out_bias
    else:
        width, bias = spec.heads * spec.value_dim, spec.bias
    ops.into_stream(heads_out, [(f"{prefix}o_proj", ops.hidden)], width=width, bias=bias, norm=norm)


def _grouped(ops: Operations, spec: AttentionSpec, layer: int, prefix: str) -> int:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    parts = [(f"{prefix}{name}_proj", rows) for name, rows in (("q", q), ("k", kv), ("v", kv))]
    whole = f"{prefix}qkv_proj"
    ops.linear("normed", "qkv", parts, width=ops.hidden, bias=spec.bias, whole=whole)
    ops.append(
        Kind.HEADS,
        x="qkv",
        layer=layer,
        heads=spec.heads,
        table=ops.ropes.index(spec.rope),
        weight=ops.weights.floats(_head_norms(ops, spec, prefix)),
        eps=ops.decoder.norm_eps,
    )
    sinks = ops.checkpoint.take(f"{prefix}sinks", spec.heads) if spec.sinks else None
    ops.append(
        Kind.ATTEND,
        x="qkv",
        out=ops.room(OUT, q),
        layer=layer,
        heads=spec.heads,
        width=spec.head_dim,
        window=spec.window or 0,
        scale=spec.scale,
        limit=spec.softcap or 0.0,
        weight=ops.weights.floats(sinks),
    )
    return q


def _head_norms(ops: Operations, spec: AttentionSpec, prefix: str) -> Tensor | None:
    """Return weights [heads + kv_heads, head_dim], if heads are normed."""
    if not spec.qk_norm:
        return None
    q, k = (
        norm_weight(ops.checkpoint, f"{prefix}{name}_norm", spec.head_dim, ops.decoder)
        for name in ("q", "k")
    )
    return torch.cat([q.expand(spec.heads, -1), k.expand(spec.kv_heads, -1)])


def _latent(ops: Operations, spec: LatentAttentionSpec, layer: int, prefix: str) -> int:
    """See models/blocks/latent_attention.py for what is computed."""
    latent, head = spec.kv_rank + spec.rope_dim, spec.nope_dim + spec.rope_dim
    _projections(ops, spec, prefix)
    by_head = _absorbed(ops, spec, prefix)
    carried = ops.room("carried", spec.heads * latent)
    ops.append(
        Kind.LATENT,
        x="latent",
        y="q",
        out=carried,
        layer=layer,
        heads=spec.heads,
        table=ops.ropes.index(spec.rope),
        width=spec.kv_rank,
        x_at=spec.nope_dim,
        x_step=head,
        out_step=latent,
    )
    keys, values = by_head
    heads = spec.heads
    ops.append(
        Kind.BY_HEAD, x="q", out=carried, heads=heads, weight=keys,
        width=spec.nope_dim, x_step=head, out_step=latent,
    )  # fmt: skip
    seen = ops.room("seen", heads * spec.kv_rank)
    ops.append(
        Kind.ATTEND, x=carried, out=seen, layer=layer, heads=heads,
        width=spec.kv_rank, scale=spec.scale,
    )  # fmt: skip
    ops.append(
        Kind.BY_HEAD, x=seen, out=ops.room(OUT, heads * spec.value_dim), heads=heads, weight=values,
        width=spec.kv_rank, x_step=spec.kv_rank, out_step=spec.value_dim,
    )  # fmt: skip
    return heads * spec.value_dim


def _projections(ops: Operations, spec: LatentAttentionSpec, prefix: str) -> None:
    """Append the latent, normed, and the queries, their turned dimensions half by half."""
    x, width, name = "normed", ops.hidden, f"{prefix}q_proj"
    if spec.query_rank is not None:
        down = [(f"{prefix}q_a_proj", spec.query_rank)]
        ops.linear(x, "squeezed", down, width=width, bias=spec.bias)
        norm = f"{prefix}q_a_layernorm"
        ops.norm(norm, "squeezed", "squeezed", spec.query_rank, eps=NORM_EPS)
        x, width, name = "squeezed", spec.query_rank, f"{prefix}q_b_proj"
    rows = spec.heads * (spec.nope_dim + spec.rope_dim)
    q = ops.checkpoint.take_stored(f"{name}.weight", rows, width).view(spec.heads, -1, width)
    parts = [part for head in q for part in _in_halves(head, spec)]
    ops.product(x, "q", ops.weights.matrix(parts))
    name, latent = f"{prefix}kv_a_proj_with_mqa", spec.kv_rank + spec.rope_dim
    [kv], bias = ops.checkpoint.take_parts("", [(name, latent)], width=ops.hidden, bias=spec.bias)
    if bias is not None:
        bias = torch.cat(_in_halves(bias, spec))
    ops.product("normed", "latent", ops.weights.matrix(_in_halves(kv, spec)), bias)
    ops.norm(f"{prefix}kv_a_layernorm", "latent", "latent", spec.kv_rank, eps=NORM_EPS)


def _absorbed(ops: Operations, spec: LatentAttentionSpec, prefix: str) -> tuple[int, int]:
    """Return the addresses of each head's matrices into the latent space and out of it."""
    rows = spec.heads * (spec.nope_dim + spec.value_dim)
    both = ops.checkpoint.take_stored(f"{prefix}kv_b_proj.weight", rows, spec.kv_rank)
    by_head = both.view(spec.heads, -1, spec.kv_rank)
    keys = [ops.weights.matrix([head[: spec.nope_dim].T]) for head in by_head]
    values = [ops.weights.matrix([head[spec.nope_dim :]]) for head in by_head]
    return ops.weights.array(keys), ops.weights.array(values)


def _in_halves(rows: Tensor, spec: LatentAttentionSpec) -> list[Tensor]:
    """Cut rows so that the last `rope_dim` follow half by half where they stand pair by pair."""
    if not spec.interleaved:
        return [rows]
    plain, turned = rows[: -spec.rope_dim], rows[-spec.rope_dim :]
    return [part for part in (plain, turned[0::2], turned[1::2]) if part.shape[0]]
