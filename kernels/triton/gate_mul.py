"""The gates of feed-forward layers, gate and up side by side; perhaps the result is quantised too.

silu       silu(g) × u                         kernels/silu_mul.py
gelu_tanh  gelu(g) × u, by tanh                kernels/gelu_mul.py
clamped    g × sigmoid(alpha × g) × (u + 1)    kernels/clamped_swiglu.py
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.numbers import FP8_MAX, ceil_div, power_of_2, tanh, to_fp8

Gate = Literal["silu", "gelu_tanh", "clamped"]

_BLOCK = 1024


def gate_mul(gate_up: Tensor, gate: Gate, *, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    """Return [tokens, n] for gate and up side by side in [tokens, 2n].

    `alpha` and `limit` are for the clamped gate.
    """
    tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, columns)
    _gate_mul[(tokens, ceil_div(columns, _BLOCK))](
        gate_up,
        out,
        None,
        alpha,
        limit,
        columns,
        GATE=gate,
        BLOCK=_BLOCK,
        FP8_MAX=FP8_MAX,
        num_warps=4,
    )
    return out


def gate_mul_fp8(
    gate_up: Tensor, gate: Gate, *, alpha: float = 0.0, limit: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return float8_e4m3fn [tokens, n] and the scale of each row [tokens] float32.

    A row's largest value becomes the largest of float8; the row is its values times its scale.
    """
    tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, columns, dtype=torch.float8_e4m3fn)
    scales = gate_up.new_empty(tokens, dtype=torch.float32)
    block = power_of_2(columns)
    _gate_mul[(tokens, 1)](
        gate_up,
        out,
        scales,
        alpha,
        limit,
        columns,
        GATE=gate,
        BLOCK=block,
        FP8_MAX=FP8_MAX,
        num_warps=min(16, max(1, block // 512)),
    )
    return out, scales


@triton.jit
def _gate_mul(
    gate_up,
    out,
    scales,
    alpha,
    limit,
    columns,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = n < columns
    source = gate_up + token * 2 * columns + n
    g = tl.load(source, mask=there, other=0.0).to(tl.float32)
    u = tl.load(source + columns, mask=there, other=0.0).to(tl.float32)
    if GATE == "silu":
        y = g / (1 + tl.exp(-g)) * u
    elif GATE == "gelu_tanh":
        y = 0.5 * g * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * u
    else:
        g = tl.minimum(g, limit)
        u = tl.minimum(tl.maximum(u, -limit), limit)
        y = g / (1 + tl.exp(-alpha * g)) * (u + 1)
    if scales is not None:
        by = tl.maximum(tl.max(tl.abs(y), 0) / FP8_MAX, 1e-12)
        tl.store(scales + token, by)
        tl.store(out + token * columns + n, to_fp8(y / by), mask=there)
    else:
        tl.store(out + token * columns + n, y.to(out.dtype.element_ty), mask=there)
