"""Adds to the residual stream and norms it, in one pass; perhaps the result is quantised too."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.numbers import FP8_MAX, power_of_2, to_fp8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x²) + eps) × weight for x [tokens, hidden] (kernels/rms_norm.py)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(None, x, weight, eps, out, None)
    return out


def add_rms_norm_(x: Tensor, stream: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x [tokens, hidden] to the stream of that shape in place; return the stream's norm.

    The sum is rounded to the stream's dtype before it is normed, as if the two were apart
    (kernels/rms_norm.py).
    """
    out = torch.empty_like(x)
    _launch(x, stream, weight, eps, out, None)
    return out


def add_rms_norm_fp8_(
    x: Tensor, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Do the same; return float8_e4m3fn [tokens, hidden] and scales [tokens] float32.

    A row's largest value becomes the largest of float8; the row is its values times its scale.
    """
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch(x, stream, weight, eps, out, scales)
    return out, scales


def _launch(
    x: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    scales: Tensor | None,
) -> None:
    tokens, hidden = stream.shape
    assert stream.stride(1) == 1
    assert x is None or x.stride(1) == 1
    block = power_of_2(hidden)
    _add_rms_norm[(tokens,)](
        x,
        stream,
        weight,
        out,
        scales,
        eps,
        0 if x is None else x.stride(0),
        stream.stride(0),
        HIDDEN=hidden,
        BLOCK=block,
        FP8_MAX=FP8_MAX,
        num_warps=min(16, max(1, block // 512)),
    )


@triton.jit
def _add_rms_norm(
    x,
    stream,
    weight,
    out,
    scales,
    eps,
    s_x,
    s_stream,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    there = d < HIDDEN
    at = stream + token * s_stream + d
    total = tl.load(at, mask=there, other=0.0)
    if x is not None:
        added = tl.load(x + token * s_x + d, mask=there, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + added).to(stream.dtype.element_ty)
        tl.store(at, total, mask=there)
    values = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / HIDDEN + eps)
    normed = values * scale * tl.load(weight + d, mask=there, other=0.0).to(tl.float32)
    if scales is not None:
        by = tl.maximum(tl.max(tl.abs(normed), 0) / FP8_MAX, 1e-12)
        tl.store(scales + token, by)
        tl.store(out + token * HIDDEN + d, to_fp8(normed / by), mask=there)
    else:
        tl.store(out + token * HIDDEN + d, normed.to(out.dtype.element_ty), mask=there)
