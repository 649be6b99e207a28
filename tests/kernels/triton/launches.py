"""Every launcher at the shapes of models in production, on tensors without memory.

Shapes are those of Llama 3 8B and 70B (one rank of 8), Gemma 2 9B, GPT-OSS, Phi-3 and
DeepSeek-V3.
"""

import torch
from torch import Tensor

from baton.kernels.attention_scores import Scoring
from baton.kernels.triton.decode_attention import decode_attention, decode_programs
from baton.kernels.triton.decode_plan import plan_decode
from baton.kernels.triton.prefill_attention import prefill_attention

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
INT32, FLOAT32 = torch.int32, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return a tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def pool_layer(kv_heads: int, head_dim: int, dtype: torch.dtype = BF16, parts: int = 2) -> Tensor:
    """Return one layer of a pool of 32 layers in blocks of 16 tokens."""
    return meta(4096, 32, parts, kv_heads, 16, head_dim, dtype=dtype)[:, 7]


def decode(
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    rows: int = 128,
    dtype: torch.dtype = BF16,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> None:
    """Plan and launch decode attention."""
    plan = plan_decode(meta(rows, dtype=INT32), decode_programs(heads, kv_heads), window)
    scoring = Scoring(head_dim**-0.5, softcap, meta(heads) if sinks else None)
    scales = meta(2, kv_heads, dtype=FLOAT32) if dtype == FP8 else None
    q = meta(rows, heads + 2 * kv_heads, head_dim)[:, :heads]
    kv = pool_layer(kv_heads, head_dim, dtype)
    decode_attention(q, kv, meta(rows, 512, dtype=INT32), plan, scoring, scales)


def prefill(
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    tokens: int = 8192,
    dtype: torch.dtype = BF16,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> None:
    """Launch prefill attention of 16 chunks."""
    scoring = Scoring(head_dim**-0.5, softcap, meta(heads) if sinks else None)
    scales = meta(2, kv_heads, dtype=FLOAT32) if dtype == FP8 else None
    q = meta(tokens, heads + 2 * kv_heads, head_dim)[:, :heads]
    kv = pool_layer(kv_heads, head_dim, dtype)
    tables, starts, lengths = (meta(*shape, dtype=INT32) for shape in ((16, 512), (17,), (16,)))
    prefill_attention(q, kv, tables, starts, lengths, scoring, window=window, kv_scales=scales)


LAUNCHES = {
    "decode_attention/8b": lambda: decode(32, 8, 128),
    "decode_attention/8b fp8": lambda: decode(32, 8, 128, dtype=FP8),
    "decode_attention/70b tp8": lambda: decode(8, 1, 128, rows=256),
    "decode_attention/gemma2": lambda: decode(16, 8, 256, window=4096, softcap=50.0),
    "decode_attention/gemma2 fp8": lambda: decode(16, 8, 256, dtype=FP8, softcap=50.0),
    "decode_attention/gpt-oss": lambda: decode(64, 8, 64, window=128, sinks=True),
    "decode_attention/phi3": lambda: decode(32, 32, 96),
    "decode_attention/head 192": lambda: decode(32, 8, 192),
    "prefill_attention/8b": lambda: prefill(32, 8, 128),
    "prefill_attention/8b fp8": lambda: prefill(32, 8, 128, dtype=FP8),
    "prefill_attention/gemma2": lambda: prefill(16, 8, 256, window=4096, softcap=50.0),
    "prefill_attention/gpt-oss": lambda: prefill(64, 8, 64, window=128, sinks=True),
    "prefill_attention/phi3": lambda: prefill(32, 32, 96),
}
"""By kernel and case."""
