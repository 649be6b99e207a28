"""Every launcher at the shapes of models in production, on tensors without memory.

Shapes are those of Llama 3 8B and 70B (one rank of 8), Gemma 2 9B, GPT-OSS, Phi-3 and
DeepSeek-V3.
"""

import torch
from torch import Tensor

from baton.kernels.attention_scores import Scoring
from baton.kernels.routing import Routing
from baton.kernels.triton.add_rms_norm import add_rms_norm_, add_rms_norm_fp8_, rms_norm
from baton.kernels.triton.block_copy import gather_blocks, scatter_blocks
from baton.kernels.triton.decode_attention import decode_attention, decode_programs
from baton.kernels.triton.decode_plan import plan_decode
from baton.kernels.triton.gate_mul import gate_mul, gate_mul_fp8
from baton.kernels.triton.grouped_linear import grouped_linear, tile_rows
from baton.kernels.triton.kv_digest import unit_sums
from baton.kernels.triton.latent_write import latent_write_
from baton.kernels.triton.mla_decode import mla_decode, mla_programs
from baton.kernels.triton.moe_routing import order_by_expert, route
from baton.kernels.triton.prefill_attention import prefill_attention
from baton.kernels.triton.rope_kv_write import rope_kv_write_
from baton.kernels.triton.run_copy import copy_runs
from baton.kernels.triton.sampling import (
    LogitChanges,
    Penalties,
    SamplingTensors,
    change_logits_,
    sample,
)
from baton.kernels.triton.skinny_linear import skinny_linear

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
INT32, FLOAT32 = torch.int32, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Return a tensor that has a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def pool_layer(kv_heads: int, head_dim: int, dtype: torch.dtype = BF16, parts: int = 2) -> Tensor:
    """Return one layer of a pool of 32 layers in blocks of 16 tokens."""
    return meta(4096, 32, parts, kv_heads, 16, head_dim, dtype=dtype)[:, 7]


def pool_scales(kv_heads: int, parts: int = 2) -> Tensor:
    """Return the scales of one layer of that pool."""
    return meta(4096, 32, parts, kv_heads, dtype=FLOAT32)[:, 7]


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
    scales = pool_scales(kv_heads) if dtype == FP8 else None
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
    sequences: int = 16,
    skip_below: float = 0.0,
) -> None:
    """Launch prefill attention of some chunks."""
    scoring = Scoring(head_dim**-0.5, softcap, meta(heads) if sinks else None)
    scales = pool_scales(kv_heads) if dtype == FP8 else None
    q = meta(tokens, heads + 2 * kv_heads, head_dim)[:, :heads]
    kv = pool_layer(kv_heads, head_dim, dtype)
    tables, starts, lengths = (
        meta(*shape, dtype=INT32) for shape in ((sequences, 512), (sequences + 1,), (sequences,))
    )
    prefill_attention(
        q, kv, tables, starts, lengths, scoring, window=window, kv_scales=scales,
        skip_below=skip_below,
    )  # fmt: skip


def rope(
    heads: int, kv_heads: int, head_dim: int, half: int, dtype: torch.dtype, *, normed: bool
) -> None:
    """Launch rope and the write of KV for 4096 tokens."""
    rope_kv_write_(
        meta(4096, heads + 2 * kv_heads, head_dim),
        pool_layer(kv_heads, head_dim, dtype),
        meta(4096, dtype=torch.int64),
        meta(4096, half, dtype=FLOAT32),
        meta(4096, half, dtype=FLOAT32),
        norm_weights=meta(heads + kv_heads, head_dim) if normed else None,
        kv_scales=pool_scales(kv_heads) if dtype == FP8 else None,
    )


def sampled(rows: int, vocabulary: int, *, penalised: bool) -> None:
    """Launch the sampling of a batch."""
    one = meta(rows, dtype=FLOAT32)
    params = SamplingTensors(
        one,
        meta(rows, dtype=INT32),
        one,
        one,
        meta(rows, dtype=torch.int64),
        meta(rows, dtype=torch.int64),
    )
    if not penalised:
        sample(meta(rows, vocabulary), params)
        return
    seen, sequences = meta(512, vocabulary, dtype=INT32), meta(rows, dtype=INT32)
    logits = meta(rows, vocabulary, dtype=FLOAT32)
    changes = LogitChanges(
        meta(64, dtype=INT32),
        meta(64, dtype=INT32),
        meta(64, dtype=FLOAT32),
        meta(64, dtype=torch.int64),
        meta(64, 4, dtype=INT32),
    )
    change_logits_(logits, changes, params.positions, meta(rows, 4, dtype=INT32))
    sample(logits, params, Penalties(seen, sequences, one, one, one))


def skinny(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype = BF16, *, zeros: bool = False
) -> None:
    """Launch a linear layer of few rows; uint8 stands for int4."""
    four = dtype == torch.uint8
    scales = None
    if dtype != BF16:
        scales = meta(outputs, inputs // 128 if four else 1, dtype=FLOAT32)
    weight = meta(outputs, inputs // 2 if four else inputs, dtype=dtype)
    points = meta(outputs, inputs // 128, dtype=torch.uint8) if zeros else None
    skinny_linear(meta(rows, inputs), weight, scales, zeros=points)


def mla(heads: int, dtype: torch.dtype = BF16) -> None:
    """Plan and launch MLA decode of DeepSeek-V3's shape."""
    plan = plan_decode(meta(128, dtype=INT32), mla_programs(heads, dtype))
    kv = pool_layer(1, 576, dtype, parts=1)
    tables = meta(128, 512, dtype=INT32)
    scales = pool_scales(1, parts=1) if dtype == FP8 else None
    q = meta(128, heads, 576)
    mla_decode(q, kv, tables, plan, Scoring(0.07), rank=512, kv_scales=scales)


def latent(heads: int, dtype: torch.dtype = BF16) -> None:
    """Launch the write of DeepSeek-V3's latents."""
    latent_write_(
        meta(4096, 576),
        meta(4096, heads, 192),
        pool_layer(1, 576, dtype, parts=1),
        meta(4096, dtype=torch.int64),
        meta(4096, 32, dtype=FLOAT32),
        meta(4096, 32, dtype=FLOAT32),
        meta(512),
        1e-6,
        pool_scales(1, parts=1) if dtype == FP8 else None,
    )


def routed(tokens: int, experts: int, routing: Routing, *, corrected: bool = False) -> None:
    """Launch routing and the order of a batch."""
    correction = meta(experts, dtype=FLOAT32) if corrected else None
    chosen, _ = route(meta(tokens, experts, dtype=FLOAT32), routing, correction)
    order_by_expert(chosen, experts, tile_rows(chosen.numel(), experts))


def grouped(
    tokens: int,
    experts: int,
    inputs: int,
    outputs: int,
    top_k: int,
    dtype: torch.dtype = BF16,
    *,
    first: bool = False,
) -> None:
    """Launch the second linear layer of experts: its rows are slots, and weighted.

    Or the first one, whose rows are tokens, and serve all of a token's slots.
    """
    chosen = meta(tokens, top_k, dtype=INT32)
    order = order_by_expert(chosen, experts, tile_rows(chosen.numel(), experts))
    scales = meta(experts, outputs, dtype=FLOAT32) if dtype != BF16 else None
    weight = meta(experts, outputs, inputs, dtype=dtype)
    if dtype == torch.uint8:  # stands for MXFP4
        scales = meta(experts, outputs, inputs // 32, dtype=torch.uint8)
        weight = meta(experts, outputs, inputs // 2, dtype=torch.uint8)
    if first:
        grouped_linear(meta(tokens, inputs), weight, order, scales=scales)
        return
    weights = meta(tokens, top_k, dtype=FLOAT32)
    grouped_linear(meta(tokens * top_k, inputs), weight, order, scales=scales, weights=weights)


def block_copies(dtype: torch.dtype) -> None:
    """Launch the staging of 8 layers and half of the heads of 64 blocks, both ways."""
    part = meta(4096, 32, 2, 8, 16, 128, dtype=dtype)[:, 8:16, :, 4:]
    staged = meta(64, 8, 2, 4, 16, 128, dtype=dtype)
    gather_blocks(part, meta(64, dtype=INT32), staged)
    scatter_blocks(part, meta(64, dtype=INT32), staged)


def digests(grain: int) -> None:
    """Launch the digests of 8 layers of 64 blocks: half of the heads, or fp8 with scales."""
    unit_sums(
        meta(1 << 28, dtype=INT32),
        meta(64 * 16, dtype=torch.int64),
        meta(64, 3, dtype=INT32),
        meta(64, 16, dtype=INT32),
        meta(66 * 16, dtype=INT32),
        17,
        grain=grain,
    )


def run_copies(grain: int) -> None:
    """Launch the copy of 512 runs of 32 KiB."""
    copy_runs(meta(512, 3, dtype=torch.int64), 32 << 10, grain=grain)


_DEEPSEEK = Routing("sigmoid", 8, 8, 4, True, 2.5)

LAUNCHES = {
    "decode_attention/8b": lambda: decode(32, 8, 128),
    "decode_attention/8b fp8": lambda: decode(32, 8, 128, dtype=FP8),
    "decode_attention/70b tp8": lambda: decode(8, 1, 128, rows=256),
    "decode_attention/gemma2": lambda: decode(16, 8, 256, window=4096, softcap=50.0),
    "decode_attention/gemma2 fp8": lambda: decode(16, 8, 256, dtype=FP8, softcap=50.0),
    "decode_attention/gpt-oss": lambda: decode(64, 8, 64, window=128, sinks=True),
    "decode_attention/phi3": lambda: decode(32, 32, 96),
    "decode_attention/one row": lambda: decode(8, 1, 128, rows=1),
    "prefill_attention/8b": lambda: prefill(32, 8, 128),
    "prefill_attention/8b fp8": lambda: prefill(32, 8, 128, dtype=FP8),
    "prefill_attention/70b tp8": lambda: prefill(8, 1, 128),
    "prefill_attention/8b skipping": lambda: prefill(32, 8, 128, skip_below=1e-4),
    "prefill_attention/gemma2": lambda: prefill(16, 8, 256, window=4096, softcap=50.0),
    "prefill_attention/gemma2 fp8": lambda: prefill(16, 8, 256, dtype=FP8, softcap=50.0),
    "prefill_attention/gemma2 skipping": lambda: prefill(
        16, 8, 256, window=4096, softcap=50.0, skip_below=1e-4
    ),
    "prefill_attention/gpt-oss": lambda: prefill(64, 8, 64, window=128, sinks=True),
    "prefill_attention/one row": lambda: prefill(8, 1, 128, tokens=1, sequences=1),
    "prefill_attention/phi3": lambda: prefill(32, 32, 96),
    "rope_kv_write/8b": lambda: rope(32, 8, 128, 64, BF16, normed=False),
    "rope_kv_write/70b tp8": lambda: rope(8, 1, 128, 64, BF16, normed=False),
    "rope_kv_write/normed fp8": lambda: rope(32, 8, 128, 64, FP8, normed=True),
    "rope_kv_write/partial": lambda: rope(32, 32, 96, 36, BF16, normed=False),
    "latent_write/deepseek": lambda: latent(128),
    "latent_write/deepseek fp8": lambda: latent(16, FP8),
    "add_rms_norm/norm alone": lambda: rms_norm(meta(256, 4096), meta(4096), 1e-5),
    "add_rms_norm/8b": lambda: add_rms_norm_(meta(256, 4096), meta(256, 4096), meta(4096), 1e-5),
    "add_rms_norm/70b": lambda: add_rms_norm_(meta(256, 8192), meta(256, 8192), meta(8192), 1e-5),
    "add_rms_norm/deepseek": lambda: add_rms_norm_(
        meta(256, 7168), meta(256, 7168), meta(7168), 1e-6
    ),
    "add_rms_norm/70b fp8": lambda: add_rms_norm_fp8_(
        meta(256, 8192), meta(256, 8192), meta(8192), 1e-5
    ),
    "sampling/8b": lambda: sampled(256, 128256, penalised=False),
    "sampling/one row": lambda: sampled(1, 4096, penalised=True),
    "sampling/penalised": lambda: sampled(256, 128256, penalised=True),
    "skinny_linear/8b o": lambda: skinny(1, 4096, 4096),
    "skinny_linear/8b gate_up": lambda: skinny(64, 28672, 4096),
    "skinny_linear/8b qkv": lambda: skinny(32, 6144, 4096),
    "skinny_linear/8b down": lambda: skinny(16, 4096, 14336),
    "skinny_linear/8b head": lambda: skinny(64, 128256, 4096),
    "skinny_linear/70b tp8 qkv": lambda: skinny(32, 1280, 8192),
    "skinny_linear/70b tp8 o": lambda: skinny(32, 8192, 1024),
    "skinny_linear/70b tp8 gate_up": lambda: skinny(64, 7168, 8192),
    "skinny_linear/70b tp8 head": lambda: skinny(64, 16032, 8192),
    "skinny_linear/deepseek tp8 q_b": lambda: skinny(64, 3072, 1536),
    "skinny_linear/deepseek kv_a": lambda: skinny(64, 576, 7168),
    "skinny_linear/8b o 17 rows": lambda: skinny(17, 4096, 4096),
    "skinny_linear/70b tp8 down": lambda: skinny(32, 8192, 3584),
    "skinny_linear/8b fp8": lambda: skinny(16, 28672, 4096, FP8),
    "skinny_linear/8b fp8 64 rows": lambda: skinny(64, 4096, 4096, FP8),
    "skinny_linear/8b int8": lambda: skinny(32, 28672, 4096, torch.int8),
    "skinny_linear/8b int4": lambda: skinny(1, 28672, 4096, torch.uint8),
    "skinny_linear/8b int4 64 rows": lambda: skinny(64, 4096, 14336, torch.uint8),
    "skinny_linear/8b int4 zeros": lambda: skinny(16, 28672, 4096, torch.uint8, zeros=True),
    "mla_decode/deepseek": lambda: mla(128),
    "mla_decode/deepseek tp8": lambda: mla(16),
    "mla_decode/deepseek fp8": lambda: mla(128, FP8),
    "moe_routing/mixtral": lambda: routed(256, 8, Routing("softmax", 2, normalise=True)),
    "moe_routing/one row": lambda: routed(1, 32, Routing("top_softmax", 4)),
    "moe_routing/deepseek": lambda: routed(8192, 256, _DEEPSEEK, corrected=True),
    "grouped_linear/mixtral": lambda: grouped(32, 8, 14336, 4096, 2),
    "grouped_linear/mixtral first": lambda: grouped(32, 8, 4096, 28672, 2, first=True),
    "grouped_linear/mixtral first prefill": lambda: grouped(8192, 8, 4096, 28672, 2, first=True),
    "grouped_linear/mixtral prefill": lambda: grouped(8192, 8, 14336, 4096, 2),
    "grouped_linear/deepseek": lambda: grouped(2048, 256, 2048, 7168, 8),
    "grouped_linear/deepseek first": lambda: grouped(128, 256, 7168, 4096, 8, first=True),
    "grouped_linear/deepseek fp8": lambda: grouped(128, 256, 2048, 7168, 8, FP8),
    "grouped_linear/deepseek fp8 prefill": lambda: grouped(8192, 256, 2048, 7168, 8, FP8),
    "grouped_linear/gpt-oss mxfp4": lambda: grouped(64, 32, 2880, 2880, 4, torch.uint8),
    "grouped_linear/gpt-oss mxfp4 prefill": lambda: grouped(8192, 32, 2880, 2880, 4, torch.uint8),
    "block_copy/bf16": lambda: block_copies(BF16),
    "block_copy/fp8": lambda: block_copies(FP8),
    "run_copy/16": lambda: run_copies(16),
    "run_copy/4": lambda: run_copies(4),
    "kv_digest/heads": lambda: digests(16),
    "kv_digest/fp8 with scales": lambda: digests(1),
    "gate_mul/8b": lambda: gate_mul(meta(256, 2 * 14336), "silu"),
    "gate_mul/70b tp8": lambda: gate_mul(meta(256, 2 * 3584), "silu"),
    "gate_mul/deepseek": lambda: gate_mul(meta(1024, 2 * 2048), "silu"),
    "gate_mul/70b fp8": lambda: gate_mul_fp8(meta(256, 2 * 28672), "silu"),
    "gate_mul/gemma2": lambda: gate_mul(meta(256, 2 * 14336), "gelu_tanh"),
    "gate_mul/gpt-oss": lambda: gate_mul(meta(256, 2 * 2880), "clamped", alpha=1.702, limit=7.0),
}
"""By kernel and case."""

_ATTENTION = {"decode_attention": "8b", "prefill_attention": "8b", "rope_kv_write": "8b"}
_ENDS = {"add_rms_norm": "8b", "sampling": "8b", "block_copy": "bf16", "kv_digest": "heads"}

MODELS = {
    "8b dense": _ATTENTION | _ENDS | {"skinny_linear": "8b", "gate_mul": "8b"},
    "70b tp8 dense": {
        "decode_attention": "70b tp8",
        "prefill_attention": "70b tp8",
        "rope_kv_write": "70b tp8",
        "add_rms_norm": "70b",
        "skinny_linear": "70b tp8",
        "gate_mul": "70b tp8",
    },
    # Mixtral 8x7B's attention, norms and gates are an 8B model's.
    "mixtral": _ATTENTION
    | _ENDS
    | {
        "moe_routing": "mixtral",
        "grouped_linear": "mixtral",
        "gate_mul": "8b",
        "skinny_linear": "8b",
    },
    "deepseek": {
        "mla_decode": "deepseek",
        "latent_write": "deepseek",
        "add_rms_norm": "deepseek",
        "moe_routing": "deepseek",
        "grouped_linear": "deepseek",
        "gate_mul": "deepseek",
        "skinny_linear": "deepseek",
    },
}
"""Models in production, and for each kernel that a step of theirs launches, the case here."""
