"""The gate of a SwiGLU feed-forward layer (Shazeer, 2020)."""

from torch import Tensor
from torch.nn import functional

from baton.kernels.backend import triton_serves


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) × up, [tokens, n], for gate and up side by side in [tokens, 2n]."""
    if triton_serves(gate_up):
        from baton.kernels.triton.gate_mul import gate_mul

        return gate_mul(gate_up, "silu")
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
