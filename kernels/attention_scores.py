"""Scores, softmax and weighted sum, for queries and keys that lie side by side in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores are made of products q · k."""

    scale: float
    softcap: float | None = None
    """Scores are squeezed to ± this by tanh (Gemma 2)."""
    sinks: Tensor | None = None
    """[heads]: a score per head that takes its share of the softmax and gives nothing (GPT-OSS)."""

    @property
    def fused(self) -> bool:
        """Whether torch's own attention computes this, without the scores in memory."""
        return self.softcap is None and self.sinks is None


def weigh(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring, *, causal: bool = False
) -> Tensor:
    """Return the attention output [n, heads, rows, head_dim].

    q is [n, heads, rows, head_dim], k and v are [n, kv_heads, keys, head_dim], mask broadcasts to
    [n, heads, rows, keys] and is added to the scores. `causal` without a mask is for fused scoring
    and as many rows as keys.
    """
    if scoring.fused:
        return functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            scale=scoring.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
    assert mask is not None
    count, heads, rows, head_dim = q.shape
    grouped = q.reshape(count, k.shape[1], -1, head_dim)
    scores = torch.matmul(grouped * scoring.scale, k.transpose(-1, -2))
    scores = scores.view(count, heads, rows, -1)
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    shares = _softmax(scores.add_(mask), scoring.sinks)
    return torch.matmul(shares.view(*grouped.shape[:3], -1), v).view(q.shape)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax of [n, heads, rows, keys] over the keys and, if there is one, the sink."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.view(1, -1, 1, 1)
    highest = torch.maximum(scores.amax(-1, keepdim=True), column)
    shares = scores.sub_(highest).exp_()
    return shares.div_(shares.sum(-1, keepdim=True) + (column - highest).exp())
