"""The gate of GPT-OSS: a SwiGLU whose inputs are limited and whose up part is off by one."""

import torch
from torch import Tensor

from baton.kernels.backend import triton_serves


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """Return g × sigmoid(alpha × g) × (u + 1), [tokens, n], of gate and up in [tokens, 2n].

    g is the gate, at most `limit`; u is up, between ±`limit`.
    """
    if triton_serves(gate_up):
        from baton.kernels.triton.gate_mul import gate_mul

        return gate_mul(gate_up, "clamped", alpha=alpha, limit=limit)
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return gate.mul_(torch.sigmoid(gate * alpha)).mul_(up.add_(1))
